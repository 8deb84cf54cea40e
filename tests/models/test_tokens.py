"""Blocks that merge tokens, of every family that can: elastic = extracted = read back, costs are exact."""

import copy
import threading

import architectures
import pytest
import torch
from helpers import make_batches, make_images, make_model, make_net, relative_error

import stratavit
from stratavit import StrataViTError, SuperNet, UnsupportedModelError
from stratavit.models.cost import linear_macs

CANNOT = (
    "vit_base_patch16_rpn_224",
    "beit_base",
    "beitv2_base",
    "swin",
    "vit_relpos",
    "vit_srelpos",
    "samvit",
    "naflexvit",
)
NAMES = [name for name in architectures.NAMES if not name.startswith(CANNOT) and not name.endswith(".naflex")]
MERGE = (*NAMES, architectures.TORCHVISION)
SPEC = {"blocks.0.tokens": 9, "blocks.1.tokens": 5, "blocks.1.attn": 8}


@pytest.mark.parametrize("name", MERGE)
def test_merging_networks_keep_the_contract(name, tmp_path):
    model, images = architectures.make(name), make_images(4, seed=9)
    net = SuperNet(model).eval()
    small = net.small_at(SPEC)
    with torch.no_grad():
        assert relative_error(net(images), model(images)) < 1e-6
        elastic = net(images, SPEC)
        assert relative_error(elastic, net(images)) > 1e-3
        assert relative_error(small(images), elastic) < 1e-5
        assert relative_error(torch.cat([net(image[None], SPEC) for image in images]), elastic) < 1e-4
    size = net.data_config["input_size"]
    for attention in (False, True):
        assert linear_macs(small, size, attention=attention) == net.macs(SPEC, attention=attention)
    assert net.macs(SPEC) < net.macs({"blocks.1.attn": 8})
    assert sum(p.numel() for p in small.parameters()) == net.params(SPEC) == net.params({"blocks.1.attn": 8})
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))


def test_blocks_that_merge_nothing_stay_stock():
    kinds = lambda spec: [type(block).__name__ for block in make_net("plain").extract(spec=spec).blocks]  # noqa: E731
    assert kinds({"blocks.1.mlp": 20}) == ["Block", "Block"]
    assert kinds({"blocks.1.tokens": 8}) == ["Block", "MergingBlock"]


@pytest.mark.parametrize(
    "name",
    [*(name for name in architectures.NAMES if name.startswith(CANNOT)), *architectures.TRANSFORMERS],
)
def test_models_that_cannot_merge_refuse(name):
    net = SuperNet(architectures.make(name))
    with pytest.raises(StrataViTError, match=r"blocks\.0\.tokens"):
        net.macs({"blocks.0.tokens": 8})
    with pytest.raises(StrataViTError, match="axes"):
        net.stratify(make_batches(), axes=("width", "tokens"))


@pytest.mark.parametrize(
    "spec",
    [
        {"blocks.0.tokens": 17},
        {"blocks.0.tokens": 5},
        {"blocks.2.tokens": 9},
        {"blocks.0.tokens": {"qk": 3, "v": 9}},
        {"blocks.0.tokens": 12, "blocks.1.tokens": 3},
    ],
)
def test_counts_that_cannot_be_are_refused(spec):
    with pytest.raises(StrataViTError, match=list(spec)[-1]):
        make_net("plain").resolve(spec)


def test_all_tokens_are_the_full_width():
    net = make_net("plain")
    assert net.resolve({"blocks.0.tokens": 16}) == net.resolve(None)
    assert net.macs({"blocks.0.tokens": 8, "blocks.1.tokens": 12}) == net.macs(
        {"blocks.0.tokens": 8}
    )  # only 8 are left


def test_threads_merge_their_own_tokens():
    net, images = make_net("plain"), make_images(4)
    specs = [{}, {"blocks.0.tokens": 8}, {"blocks.1.tokens": 6}]
    with torch.no_grad():
        alone = [net(images, spec) for spec in specs]
    wrong = []

    def work(spec, expected):
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(net(images, spec), expected))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(specs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("side", [16, 40, 64])
@pytest.mark.parametrize("spec", [{"blocks.0.tokens": 8}, {"blocks.0.tokens": 6, "blocks.1.tokens": 2}])
def test_images_of_another_size(tmp_path, side, spec):
    """Costs and outputs follow; the numbers still mean the size that the network was made for, also in files."""
    net = SuperNet(make_model("plain")).eval()
    net.model.set_input_size((side, side))
    size, images = (3, side, side), torch.randn(1, 3, side, side)
    assert net.macs(spec) == linear_macs(net.small_at(spec), size) < net.macs()
    net.save(tmp_path / "net")
    again = SuperNet.load(tmp_path / "net")
    assert again.macs(spec) == net.macs(spec)
    with torch.no_grad():
        assert torch.equal(again(images, spec), net(images, spec))


def test_a_small_model_that_merges_is_no_source():
    with pytest.raises(UnsupportedModelError, match="merges tokens"):
        SuperNet(make_net("plain").extract(spec=SPEC))


def test_patches_that_are_dropped_in_training_keep_their_positions():
    net = SuperNet(architectures.make("vit_small_patch16_dinov3", patch_drop_rate=0.5)).train()
    assert net(make_images(3), {"blocks.0.tokens": 9}).isfinite().all()


def test_every_weight_of_a_merging_network_learns():
    """Elastic and extracted alike: gradients pass through the merges."""
    net, images, spec = copy.deepcopy(make_net("plain")), make_images(4), {"blocks.0.tokens": 9}
    small = net.small_at(spec).requires_grad_(True)
    small(images).square().sum().backward()
    net(images, spec).square().sum().backward()
    found = dict(net.model.named_parameters())
    for name, parameter in small.named_parameters():
        assert parameter.grad.abs().sum() > 0
        assert relative_error(parameter.grad, found[name].grad) < 1e-4


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
)
def test_dense_features_have_every_patch(name):
    """timm's own readers of features run; a patch has what its token became, told by the map in the block's output."""
    small, images = SuperNet(architectures.make(name)).extract(spec=SPEC), make_images(2)
    seen = []
    small.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        _, features = small.forward_intermediates(images, indices=[0, 1], norm=False, output_fmt="NLC")
        first, state = features[0], seen[0]
        patches = state.tokens[:, state.prefix :]
        for image in range(2):
            assert torch.equal(first[image], patches[image, state.home[image]])
        assert len(set(state.home[0].tolist())) == 9
        assert torch.equal(small.norm(features[1]), small.forward_features(images)[:, state.prefix :])
        assert small.forward_intermediates(images, indices=[0], intermediates_only=True)[0].dim() == 4


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_exported_equals_eager(tmp_path, format):
    parity = stratavit.export(make_net("plain").extract(spec=SPEC), tmp_path / "small", format, images=make_images(3))
    assert parity.difference < 1e-4
