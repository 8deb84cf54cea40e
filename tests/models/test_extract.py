"""Extraction: a plain small model that computes what the elastic prefix computes, without this library."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from helpers import METHODS, MIXED, make_images, make_model, make_net, relative_error, spec_strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention, Mlp
from torch.utils.flop_counter import FlopCounterMode

from stratavit import Setting, StrataViTError, SuperNet
from stratavit.models.number_types import in_type

IMAGES = make_images(2, seed=9)


@pytest.mark.parametrize("method", [*METHODS, "with final mean"])
@settings(max_examples=10)
@given(data=st.data())
def test_extracted_equals_elastic(family, method, data):
    net = make_net(family, stratified=True) if method == "with final mean" else make_net(family, method)
    spec = data.draw(spec_strategy(family))
    with torch.no_grad():
        assert relative_error(net.extract(spec=spec)(IMAGES), net(IMAGES, spec)) <= 1e-5


def test_full_size_is_bit_identical_to_the_source(source):
    with torch.no_grad():
        assert torch.equal(SuperNet(source).extract(spec={})(IMAGES), source(IMAGES))


def test_layers_are_stock_timm_of_the_asked_width(family):
    net = make_net(family)
    small = net.extract(spec={"blocks.0.attn": 5, "blocks.0.mlp": 17})
    assert type(small) is type(make_model(family))
    assert not small.training
    for index, (head_dim, hidden) in enumerate([(5, 17), (net.sites[2].width, net.sites[3].width)]):
        attn, mlp = small.blocks[index].attn, small.blocks[index].mlp
        assert (type(attn), type(mlp)) == (Attention, Mlp)
        assert (attn.head_dim, attn.num_heads, attn.scale) == (head_dim, net.sites[0].heads, head_dim**-0.5)
        assert mlp.fc1.out_features == mlp.fc2.in_features == hidden


@pytest.mark.parametrize(("method", "biased"), [("default", True), ("mean", True), ("paper", False)])
def test_width_zero_keeps_a_constant_or_nothing(family, method, biased):
    """Default: one vector that is added to every token, that of both modules if nothing scales. Paper: no numbers."""
    dim = make_model(family).embed_dim
    small = make_net(family, method).extract(spec={"blocks.0.attn": 0, "blocks.0.mlp": 0})
    tokens = torch.randn(2, 3, dim)
    for leaf, kept in (("attn", biased), ("mlp", biased and family == "layer_scale")):
        module = getattr(small.blocks[0], leaf)
        assert [p.numel() for p in module.parameters()] == ([dim] if kept else [])
        out = module(tokens)
        assert torch.equal(out, out[:1, :1].expand_as(tokens))
        assert bool(out.any()) == kept


@pytest.mark.parametrize("method", ["default", "paper"])
def test_the_super_network_and_its_small_model_share_nothing(family, method):
    net = make_net(family, method)
    before = copy.deepcopy(net.state_dict())
    small = net.extract(spec=MIXED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    ours = {t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}
    assert not ours & {t.data_ptr() for t in (*small.parameters(), *small.buffers())}
    assert not set(net.modules()) & set(small.modules())  # else hooks and modes would be shared


def test_small_model_can_be_trained(family):
    small = make_net(family).extract(spec=MIXED).train()
    assert all(p.is_contiguous() and p.requires_grad and p.is_leaf for p in small.parameters())
    small(IMAGES).square().sum().backward()
    for trained in (small.blocks[0].attn.qkv.weight, small.blocks[0].attn.proj.bias, small.blocks[1].attn.bias):
        assert trained.grad.any()


def test_small_model_can_be_measured_by_torchs_counter():
    """Users check MACs with it, and most of them under no_grad."""
    small = make_net("plain").extract(spec=MIXED)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(IMAGES)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_type_of_the_weights(dtype):
    net = copy.deepcopy(make_net("plain", stratified=True)).to(dtype)
    small = net.extract(spec=MIXED)
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        logits, expected = small(IMAGES.to(dtype)), net(IMAGES.to(dtype), MIXED)
    assert logits.dtype == expected.dtype == dtype
    assert relative_error(logits.double(), expected.double()) <= (0.05 if dtype.itemsize == 2 else 1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_options_of_layers_are_kept(fused):
    """Fused attention, dropout rates, activation."""
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    source = timm.create_model("vit_tiny_patch16_224", **size, **rates).eval()
    for block in source.blocks:
        block.attn.fused_attn, block.mlp.act = fused, torch.nn.ReLU()
    net, spec = SuperNet(source), {"blocks.1.attn": 8, "blocks.1.mlp": 8}
    small = net.extract(spec=spec)
    for found in (small.blocks[1], source.blocks[1]):
        assert (found.attn.attn_drop.p, found.attn.proj_drop.p, found.attn.fused_attn) == (0.2, 0.1, fused)
        assert (found.mlp.drop1.p, found.mlp.drop2.p, type(found.mlp.act)) == (0.1, 0.1, torch.nn.ReLU)
        assert found.drop_path1.drop_prob == pytest.approx(0.3)
    with torch.no_grad():
        assert relative_error(small(IMAGES), net.eval()(IMAGES, spec)) <= 1e-5


def test_small_model_says_what_it_is(family):
    net = make_net(family, stratified=True)
    small, spec = net.extract(macs=0.5, verbose=False), net.spec(macs=0.5)
    found = small.provenance
    assert (found["spec"], found["macs"], found["params"]) == (dict(spec), net.macs(spec), net.params(spec))
    assert small.data_config == net.data_config


def test_asked_got_and_range_are_printed(capsys):
    net = make_net("plain", stratified=True)
    net.extract(macs=0.5)
    assert capsys.readouterr().err.strip() == str(net.budget(macs=0.5))
    net.extract(macs=0.5, verbose=False)
    assert capsys.readouterr().err == ""


def test_small_model_runs_without_this_library(tmp_path):
    """Pickled, and read where stratavit cannot be imported; a model with no width 0 is all timm's classes."""
    small = make_net("plain").extract(spec={"blocks.0.attn": 8, "blocks.1.mlp": 8})
    with torch.no_grad():
        torch.save((small, IMAGES, small(IMAGES)), tmp_path / "small.pt")
    script = (
        "import sys, torch; sys.modules['stratavit'] = None\n"
        f"small, images, expected = torch.load({str(tmp_path / 'small.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): assert torch.allclose(small(images), expected, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extracted_in_the_type_that_the_budget_counts(dtype):
    net, spec = make_net("plain"), {"blocks.0.attn": 8}
    small = net.extract(spec=spec, setting=Setting(dtype=str(dtype).removeprefix("torch.")))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    with torch.no_grad():
        assert 0 < relative_error(small(IMAGES.to(dtype)).float(), net(IMAGES, spec)) < 0.05


def test_a_type_in_which_a_model_overflows_is_refused():
    net = make_net("plain")
    model = net.extract(spec={})
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(1e6)
    with pytest.raises(StrataViTError, match="float16"):
        in_type(model, torch.float16)
    assert in_type(model, torch.float32) is model

    def only_float32(module, inputs):
        if inputs[0].dtype is not torch.float32:
            raise RuntimeError("no kernel")

    model.register_forward_pre_hook(only_float32)
    with pytest.raises(StrataViTError, match="no kernel"):
        in_type(model, torch.float16)
