"""Image towers of open_clip: converted to timm's equivalent, cut, and put back into the model that they came from."""

import pytest
import torch
from helpers import enliven, make_images, relative_error
from hosted_models import OPEN_CLIP, batches_for, make
from torch import nn

import stratavit
from stratavit import SuperNet, UnsupportedModelError
from stratavit.dropout_list.walk import Walk
from stratavit.hosts.converting import host_outputs, uncut_error
from stratavit.models.freezing import frozen_names

open_clip = pytest.importorskip("open_clip")
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import QuickGELU, VisionTransformer  # noqa: E402

IMAGES = make_images(4)
SIZES = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 24}
FORMS = {
    "plain": {},
    "OpenAI's activation": {"act_layer": QuickGELU},
    "LayerScale": {"ls_init_value": 0.1},
    "no norm in front": {"no_ln_pre": True},
    "mean of the patches": {"pool_type": "avg"},
    "norm after the mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
}
REFUSED = {
    "attention pooling": ({"attentional_pool": True}, "pooling"),
    "no pooling": ({"pool_type": "none"}, "pooling"),
    "other blocks": ({"block_type": "custom"}, r"resblocks\.0"),
    "other activations": ({"act_layer": nn.Tanh}, r"mlp\.gelu"),
    "two outputs": ({"output_tokens": True}, "output_tokens"),
}


def tower(**more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enliven(VisionTransformer(**SIZES | more)).eval()


def trunk(**more):
    options = {"model_name": "test_vit", "embed_dim": 24, "pool": "", "proj": "linear"}
    return enliven(TimmModel(**options | more)).eval()


@torch.no_grad()
def output(model, *args):
    return model(IMAGES, *args)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_tower(form, tmp_path):
    model = tower(**FORMS[form])
    net = SuperNet(model).contract([IMAGES]).eval()
    assert net.embedding
    assert relative_error(output(net), output(model)) < 2e-5
    spec = {name: width // 2 for name, width in net.resolve(None).items()}
    small = net.extract(spec=spec, verbose=False)
    assert relative_error(output(small), output(net, spec)) < 1e-5
    stratavit.save(small, tmp_path / "small")
    assert torch.equal(output(stratavit.load(tmp_path / "small")), output(small))


@pytest.mark.parametrize("form", REFUSED)
def test_what_timm_has_no_counterpart_of_is_refused_by_name(form):
    more, words = REFUSED[form]
    with pytest.raises(UnsupportedModelError, match=words):
        SuperNet(tower(**more))


@pytest.mark.parametrize("more", [{}, {"proj_bias": True}, {"pool": "token", "proj": ""}, {"proj": "none"}])
def test_models_of_timm_in_open_clip(more):
    model, images = trunk(**more), torch.randn(1, 3, 160, 160)
    net = SuperNet(model).eval()
    assert net.embedding
    with torch.no_grad():
        assert relative_error(net(images), model(images)) < 1e-5


def test_a_projection_by_two_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="head"):
        SuperNet(trunk(proj="mlp"))


def test_a_small_tower_takes_the_place_of_the_full_one():
    """The text tower is left as it is; the full model names its tower. Images are prepared as open_clip says."""
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    clip = enliven(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)).eval()
    noted = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "squash"}
    open_clip.model.set_model_preprocess_cfg(clip, noted)
    with pytest.raises(UnsupportedModelError, match=r"model\.visual"):
        SuperNet(clip)
    net = SuperNet(clip.visual).eval()
    assert net.data_config.items() >= {"mean": noted["mean"], "std": noted["std"], "crop_mode": "squash"}.items()
    small = net.extract(spec={"blocks.0.attn": 16, "blocks.1.mlp": 9}, verbose=False)
    clip.visual = small
    with torch.no_grad():
        assert torch.equal(clip.encode_image(IMAGES), small(IMAGES))


@pytest.mark.parametrize("make", [tower, trunk])
def test_frozen_weights_of_a_tower(make):
    model = make()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    net = SuperNet(model)
    assert 0 < len(frozen_names(net.model)) < len(list(net.model.parameters()))
    again = SuperNet(net.extract(spec={}, verbose=False))
    assert frozen_names(again.model) == frozen_names(net.model)


def test_the_way_back_from_files(tmp_path):
    """The small tower has a folder of its own; the `state_dict` of the full model holds its weights, too."""
    host, batch = make(OPEN_CLIP["open_clip"]), batches_for(OPEN_CLIP["open_clip"])[0]
    net = SuperNet(host.visual).contract([batch["image"]]).eval()
    dense = host_outputs(host, batch)
    host.visual = net.extract(spec={}, verbose=False)
    assert relative_error(host_outputs(host, batch)[0], dense[0]) < 1e-5
    host.visual = net.extract(spec={name: width // 2 for name, width in net.resolve(None).items()}, verbose=False)
    expected = host_outputs(host, batch)
    assert torch.equal(expected[1], dense[1]), "the text tower"
    stratavit.save(host.visual, tmp_path / "tower")
    torch.save(host.state_dict(), tmp_path / "host.pt")
    fresh = OPEN_CLIP["open_clip"].make().eval()
    fresh.visual = stratavit.load(tmp_path / "tower")
    fresh.load_state_dict(torch.load(tmp_path / "host.pt"))
    assert all(map(torch.equal, host_outputs(fresh, batch), expected))


def test_a_tower_of_timm_is_also_cut_in_place():
    """Calibrated by the forward pass of the full model, whose output follows the smaller tower."""
    hosted = OPEN_CLIP["open_clip, timm"]
    host, batches = make(hosted), batches_for(hosted, images=4)
    net = stratavit.convert_part(host, "visual", batches, plan=Walk(states=((0.7, 1),), images=8))
    dense = host_outputs(host, batches[0])
    assert uncut_error(net, batches[0]) < 1e-5
    net.place(macs=0.8, verbose=False)
    expected = host_outputs(host, batches[0])
    assert relative_error(expected[0], dense[0]) > 1e-4
    assert torch.equal(expected[1], dense[1])
    fresh = stratavit.resize_parts(hosted.make().eval(), stratavit.part_sizes(host))
    fresh.load_state_dict(host.state_dict())
    assert all(map(torch.equal, host_outputs(fresh, batches[0]), expected))
