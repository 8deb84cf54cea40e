"""Parts with rotary positions: q and k lose whole rotation pairs, and the small model knows which are left."""

import copy

import pytest
import timm
import torch
from hosted_models import CLASSES, Hosted, batches_for, make
from torch import nn

import stratavit
from stratavit import ArtifactError
from stratavit.dropout_list.walk import Walk
from stratavit.hosts.converting import host_outputs, uncut_error
from stratavit.interop.part_sites import elastic_sites_in
from stratavit.interop.transformers.small_modules import resized, small_module

PLAN = Walk(states=((0.7, 1), (0.4, 1)), images=12)
ROTARY = ["DINOv3ViTModel", "MLCDVisionModel"]


def attention_of(name):
    """The first attention module of a model, elastic."""
    return next(site for site in elastic_sites_in(make(CLASSES[name]))[0].values() if site.attention)


def narrow(net):
    """Every attention module at a width at which rotation pairs leave."""
    return {site.name: 4 for site in net.sites if site.kind == "attention"}


@pytest.mark.parametrize("name", ROTARY)
def test_a_cut_module_is_the_full_one_without_some_pairs(name):
    """The stock module with zeros in the rows of the pairs that go, and in what v loses, computes the same."""
    site = attention_of(name)
    stock, half = copy.deepcopy(site.stock), site.full_width // 2
    site.pairs = torch.randperm(half, generator=torch.Generator().manual_seed(0))
    width, kept = 4, sorted(site.pairs[: half // 2].tolist())
    small = small_module(site, width)
    with torch.no_grad():
        for layer in (stock.q_proj, stock.k_proj):
            gone = [i for i in range(half) if i not in kept]
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor.unflatten(0, (site.heads, -1))[:, [*gone, *(i + half for i in gone)]] = 0
        stock.v_proj.weight.unflatten(0, (site.heads, -1))[:, width:] = 0
        stock.v_proj.bias.unflatten(0, (site.heads, -1))[:, width:] = 0
    x, turns = torch.randn(2, 9, 32), torch.rand(9, half).tile(2) * 6
    given = {"position_embeddings": (turns.cos(), turns.sin())}
    expected = stock(x, **given)[0]
    assert type(small) is type(stock)
    assert (small.head_dim, small.q_proj.out_features, small.v_proj.out_features) == (half, 2 * half, 2 * width)
    torch.testing.assert_close(small(x, **given)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_parts_reach_sizes_at_which_pairs_are_gone_and_come_back_from_files(name, tmp_path):
    model, batch = make(CLASSES[name]), batches_for(CLASSES[name])[0]
    net = stratavit.convert_part(model, "", batches_for(CLASSES[name]), plan=PLAN)
    assert any(site.pairs.tolist() != list(range(8)) for site in net.elastic.values() if site.attention), "not ordered"
    small = net.extract(spec=narrow(net), verbose=False)
    small.save_pretrained(tmp_path)
    back = stratavit.load_transformers(tmp_path)
    assert all(map(torch.equal, host_outputs(back, batch), host_outputs(small, batch)))
    assert {one["qk"] for one in stratavit.part_sizes(back).values() if "qk" in one} == {8}
    again, uncut = elastic_sites_in(small)
    assert not any(site.attention for site in again.values())
    assert all("full model" in reason for reason in uncut.values()), "pairs that were cut are not cut again"


def test_sizes_of_files_made_before_pairs_were_cut():
    stock = attention_of("DINOv3ViTModel").stock
    before = resized(stock, 4, True)
    assert (before.head_dim, before.q_proj.out_features) == (16, 32)
    assert "kept" not in before.state_dict()
    for qk in (3, 2, 18, "8"):
        with pytest.raises(ArtifactError, match="qk"):
            resized(stock, 4, True, qk)


def test_a_cut_dinov3_is_exported(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net = stratavit.convert_part(make(CLASSES["DINOv3ViTModel"]), "", batches_for(CLASSES["DINOv3ViTModel"]), plan=PLAN)
    small, images = net.extract(spec=narrow(net), verbose=False), torch.randn(2, 3, 32, 32)
    torch.onnx.export(small, (images,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), small(images).last_hidden_state, rtol=1e-4, atol=1e-4)


class Rotary(nn.Module):
    """A host with timm's DINOv3 in it."""

    def __init__(self):
        super().__init__()
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        self.backbone = timm.create_model("vit_small_patch16_dinov3", features_only=True, out_indices=(0, 1), **sizes)
        self.head = nn.Conv2d(64, 4, 1)

    def forward(self, images):
        return self.head(torch.cat(self.backbone(images), dim=1))


def test_models_of_timm_in_a_host_lose_pairs_too():
    hosted = Hosted(Rotary, "backbone", lambda count: {"images": torch.randn(count, 3, 32, 32)})
    host, batch = make(hosted), batches_for(hosted)[0]
    net = stratavit.convert_part(host, "backbone", batches_for(hosted), plan=PLAN)
    assert {site.rotary for site in net.sites if site.kind == "attention"} == {True}
    assert uncut_error(net, batch) < 1e-5
    net.place(spec=narrow(net))
    with torch.no_grad():
        expected = host(**batch)
    fresh = stratavit.resize_parts(Rotary().eval(), stratavit.part_sizes(host))
    fresh.load_state_dict(host.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**batch), expected)
