"""A ViT inside a larger model: calibrated through it, cut in place, and read back from files."""

import warnings
from functools import cache

import hosted_models
import pytest
import torch
from hosted_models import CLASSES, HOSTS, batches_for, make
from torch import nn
from torch.utils._pytree import tree_leaves

import stratavit
from stratavit import ArtifactError, StrataViTError, UnsupportedModelError
from stratavit.dropout_list.walk import Walk
from stratavit.hosts.converting import host_outputs, uncut_error
from stratavit.interop.part_sites import elastic_sites_in
from stratavit.interop.transformers import in_place
from stratavit.models.cost import linear_macs
from stratavit.models.families.hosted import HostedPart

PLAN = Walk(states=((0.7, 1), (0.5, 1)), images=12)
LIBRARY = [name for name in HOSTS if name != "timm"]


@cache
def converted(name):
    """Shared between tests, which put the part back."""
    hosted = HOSTS.get(name) or CLASSES[name]
    host = make(hosted)
    return host, stratavit.convert_part(host, hosted.part, batches_for(hosted), plan=PLAN), batches_for(hosted)[0]


def cut_spec(net):
    """Uneven, one attention and one MLP at width 0."""
    spec = {site.name: max(1, site.width * (2 + number % 3) // 5) for number, site in enumerate(net.sites)}
    for kind in ("attention", "mlp"):
        spec |= {site.name: 0 for site in net.sites[-4:-2] if site.kind == kind}
    return spec


def is_whole(site):
    """Whether q and k of a site are never cut."""
    return bool(site.qk_width) and not site.rotary


def distance(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).abs().max() / e.abs().max().clamp_min(1e-6)) for f, e in pairs)


def outputs(model, batch):
    with torch.no_grad():
        leaves = tree_leaves(model(**batch))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() > 1]


# ---- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HOSTS, *CLASSES])
def test_the_function_is_kept_and_the_small_part_is_the_elastic_one(name):
    _, net, _ = converted(name)
    stock, spec = net._host[1], cut_spec(net)
    batch = net.model.arguments_for(net.sample)
    assert distance(outputs(net.small_at({}), batch), outputs(stock, batch)) < 1e-5
    small = net.extract(spec=spec, verbose=False)
    assert type(small) is type(stock)
    with net.at(spec) as elastic:
        assert distance(outputs(small, batch), outputs(elastic.part, batch)) < 1e-5
    assert distance(outputs(small, batch), outputs(stock, batch)) > 1e-4


@pytest.mark.parametrize("name", [*HOSTS, *CLASSES])
def test_costs_are_exact(name):
    _, net, _ = converted(name)
    for spec in ({}, cut_spec(net), net.spec(macs=0.8)):
        small = net.small_at(spec)
        assert net.params(spec) == sum(parameter.numel() for parameter in small.parameters())
        model = net.model
        how = (model.images, model.unsqueezed, model.arguments, model.by_image, model.outputs, model.packed)
        image = net.sample[:1]
        assert net.macs(spec) == linear_macs(HostedPart("small", small, *how), tuple(image.shape[1:]), image=image)


# ---- in place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_computes_the_same_with_its_part_uncut_and_again_once_it_is_back(name):
    host, net, batch = converted(name)
    before = host_outputs(host, batch)
    assert uncut_error(net, batch) < 1e-5
    assert net.place(spec=cut_spec(net)) is host
    assert distance(host_outputs(host, batch), before) > 1e-4
    assert stratavit.part_sizes(host)
    net.restore()
    assert all(map(torch.equal, host_outputs(host, batch), before))
    assert stratavit.part_sizes(host) == {}


@pytest.mark.parametrize("name", HOSTS)
def test_the_way_back_from_a_state_dict(name):
    host, net, batch = converted(name)
    try:
        net.place(macs=0.75, verbose=False)
        sizes, state, expected = stratavit.part_sizes(host), host.state_dict(), host_outputs(host, batch)
    finally:
        net.restore()
    fresh = HOSTS[name].make().eval()
    assert stratavit.resize_parts(fresh, sizes).load_state_dict(state)
    assert all(map(torch.equal, host_outputs(fresh, batch), expected))
    assert stratavit.part_sizes(fresh) == sizes


@pytest.mark.parametrize("name", LIBRARY)
def test_the_way_back_from_save_pretrained(name, tmp_path):
    host, net, batch = converted(name)
    try:
        net.place(spec=cut_spec(net)).save_pretrained(tmp_path)
        expected, state = host_outputs(host, batch), {name: one.clone() for name, one in host.state_dict().items()}
    finally:
        net.restore()
    back = stratavit.load_transformers(tmp_path)
    assert type(back) is type(host)
    assert all(torch.equal(one, state.pop(name)) for name, one in back.state_dict().items())
    assert not state
    assert all(map(torch.equal, host_outputs(back, batch), expected))
    with pytest.raises(RuntimeError):  # transformers alone does not know the sizes
        type(host).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["Dinov2Backbone", "DINOv3ViTModel", "Siglip2VisionModel", "ViTMAEModel"])
def test_a_small_part_alone_is_saved_and_loaded(name, tmp_path):
    model, net, batch = converted(name)
    small = net.extract(spec=cut_spec(net))
    small.save_pretrained(tmp_path)
    assert stratavit.part_sizes(model) == {}, "the source was changed"
    back = stratavit.load_transformers(tmp_path)
    assert all(map(torch.equal, host_outputs(back, batch), host_outputs(small, batch)))


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_generation_goes_on(name):
    host, net, _ = converted(name)
    one = HOSTS[name].batch(1)
    try:
        net.place(spec=cut_spec(net))
        words = host.generate(**one, min_new_tokens=3, max_new_tokens=3)
    finally:
        net.restore()
    assert words.shape == (1, one["input_ids"].shape[1] + 3)


class Alone(nn.Module):
    """The first output of a host, for exporters."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def forward(self, images):
        found = self.host(images)
        return found if isinstance(found, torch.Tensor) else found.predicted_depth


@pytest.mark.parametrize("name", ["Depth Anything", "timm"])
def test_onnx_export_goes_on(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    _, net, batch = converted(name)
    images = next(iter(batch.values()))[:2]
    try:
        model = Alone(net.place(spec=cut_spec(net))).eval()
        with torch.no_grad():
            expected = model(images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "host.onnx")
    finally:
        net.restore()
    session = runtime.InferenceSession(tmp_path / "host.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert distance([torch.from_numpy(found)], [expected]) < 1e-4


# ---- what a user meets ------------------------------------------------------------------------------------------


def test_only_what_the_host_reads_counts():
    """LLaVA takes the last layer but one, so that the last stays uncut; the text tower is untouched."""
    _, net, _ = converted("LLaVA")
    assert net.name == "model.vision_tower"
    assert set(net.uncut) == {f"vision_tower.encoder.layers.2.{leaf}" for leaf in ("self_attn", "mlp")}
    assert all("does not read" in reason for reason in net.uncut.values())
    assert len(converted("CLIP")[1].model.outputs) == 1, "the pooled output alone"
    assert {name.split(".")[0] for name in net.elastic} == {"vision_tower"}


@pytest.mark.parametrize("name", [*HOSTS, *CLASSES])
def test_the_table_says_what_is_cut(name):
    """In the row of the part's class, and in that of the host with the part that it usually has."""
    _, net, _ = converted(name)
    known = in_place.HOSTS | in_place.IN_PLACE
    attention = [site for site in net.sites if site.kind == "attention"]
    whole, pairs = any(map(is_whole, attention)), any(site.rotary for site in attention)
    for one in (net.model.part, *(() if "," in name else (net.host,))):
        if type(one).__name__ in known:
            said = "v" if whole else "q, k by pairs, v" if pairs else "q, k, v"
            assert known[type(one).__name__][:2] == (said, "yes")
    assert len(attention) < len(net.sites)


def test_what_is_said_to_stay_uncut_does():
    found, uncut = elastic_sites_in(hosted_models.of_class("Swinv2Model", hosted_models.SWIN)())
    assert not found
    assert "other maps" in next(iter(uncut.values()))
    sizes = {**hosted_models.VIT, "image_size": [32, 32], "patch_size": [8, 8]}
    found, uncut = elastic_sites_in(hosted_models.of_class("InternVLVisionModel", sizes)())
    assert {site.attention for site in found.values()} == {False}
    assert len(uncut) == 3
    own = {"neck_hidden_sizes": [8, 8], "backbone_out_indices": [1, 2], "fusion_hidden_size": 8}
    assert not elastic_sites_in(hosted_models.of_class("DPTForDepthEstimation", hosted_models.VIT, **own)())[0]


def test_padding_is_not_compared():
    """NaFlex: what a tower computes for tokens that are padding neither leads the list nor counts as an error."""
    _, net, batch = converted("Siglip2VisionModel")
    tokens = net.model.maps(net.sample)[0]
    padding = batch["pixel_attention_mask"] == 0
    assert tokens.shape[:2] == padding.shape
    assert padding.any()
    assert not tokens[padding].any()
    assert tokens[~padding].abs().sum(dim=-1).all()


def test_nothing_of_the_host_is_changed_by_calibration():
    hosted = HOSTS["CLIP"]
    host = make(hosted).train()
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    stratavit.convert_part(host, "vision_model", batches_for(hosted), plan=PLAN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in host.parameters())
    assert host.training
    assert not host.vision_model._forward_hooks
    assert not host.vision_model._forward_pre_hooks


def test_a_part_that_is_not_there():
    host = make(HOSTS["LLaVA"])
    for wrong in ("backbone", "vision_towr"):
        with pytest.raises(UnsupportedModelError, match=r"did you mean .*model\.vision_tower"):
            stratavit.convert_part(host, wrong, [])
    with pytest.raises(UnsupportedModelError, match="several"):
        stratavit.convert_part(host, "mlp", [])
    with pytest.raises(UnsupportedModelError, match="reads images"):
        stratavit.convert_part(nn.Linear(2, 2), "backbone", [])


def test_hosts_that_cannot_be_followed():
    hosted = HOSTS["Depth Anything"]
    host = make(hosted)
    with pytest.raises(StrataViTError, match="no batches"):
        stratavit.convert_part(host, "backbone", [])
    with pytest.raises(StrataViTError, match="call="):
        stratavit.convert_part(host, "backbone", [{"nothing": torch.zeros(1)}])
    with pytest.raises(StrataViTError, match="did not run"):
        stratavit.convert_part(host, "backbone", batches_for(hosted), call=lambda model, batch: None)
    with pytest.raises(StrataViTError, match="given no images"):
        stratavit.convert_part(host, "head", batches_for(hosted))
    with pytest.raises(UnsupportedModelError, match="no attention or MLP"):
        stratavit.convert_part(nn.Conv2d(3, 4, 1), "", [torch.randn(2, 3, 8, 8)])
    with pytest.raises(StrataViTError, match="each time"):  # masks are drawn unless their noise is given
        stratavit.convert_part(make(CLASSES["ViTMAEModel"]), "", [torch.randn(6, 3, 32, 32)])


def test_a_part_has_no_file_and_a_whole_model_no_place(tmp_path):
    _, net, _ = converted("Dinov2Backbone")
    with pytest.raises(ArtifactError, match="save the host"):
        net.save(tmp_path / "net")
    with pytest.raises(ArtifactError, match="load_transformers"):
        stratavit.PartNet.load(tmp_path / "net")
    with pytest.raises(StrataViTError, match="extract"):
        net.place(macs=0.8)


def test_sizes_that_do_not_fit():
    fresh = HOSTS["timm"].make()
    for sizes in ({"nothing": {}}, {"head": {"width": 1, "bias": True}}, {"backbone.model.blocks.0.attn": {}}, [1]):
        with pytest.raises(ArtifactError, match="sizes"):
            stratavit.resize_parts(fresh, sizes)
    with pytest.raises(ArtifactError, match="0 to 16"):
        stratavit.resize_parts(
            make(HOSTS["CLIP"]), {"vision_model.encoder.layers.0.self_attn": {"width": 17, "bias": True}}
        )


def test_a_host_in_half_precision_and_frozen():
    hosted = HOSTS["Depth Anything"]
    host = make(hosted).bfloat16().requires_grad_(False)
    loader = [{name: value.bfloat16() for name, value in batch.items()} for batch in batches_for(hosted)]
    net = stratavit.convert_part(host, "backbone", loader, plan=PLAN)
    net.place(macs=0.8, verbose=False)
    assert {parameter.dtype for parameter in host.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in host.parameters())
    assert all(output.isfinite().all() for output in host_outputs(host, loader[0]))


def test_another_way_to_call_the_host():
    hosted = HOSTS["CLIP"]
    loader = [(batch["pixel_values"], torch.zeros(6)) for batch in batches_for(hosted)]
    net = stratavit.convert_part(
        make(hosted), "vision_model", loader, plan=PLAN, call=lambda model, batch: model.get_image_features(batch[0])
    )
    assert net.macs(net.spec(macs=0.7)) <= 0.7 * net.macs()
