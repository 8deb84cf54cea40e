"""Extraction: a plain small model that computes what the elastic prefix computes, without this library."""

import subprocess
import sys
import time

import pytest
import timm
import torch
from helpers import METHODS, make_batches, make_images, make_model, make_net, relative_error, spec_strategy
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention, Mlp
from torch.utils.flop_counter import FlopCounterMode

from stratavit import SuperNet

IMAGES = make_images(2, seed=9)
MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_extracted_equals_elastic(family, method, data):
    net, spec = make_net(family, method), data.draw(spec_strategy(family))
    with torch.no_grad():
        assert relative_error(net.extract(spec=spec)(IMAGES), net(IMAGES, spec)) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_fused_and_unfused_attention_agree(family, method):
    net = make_net(family, method)
    spec = {site.name: site.steps[1] for site in net.sites}
    small = net.extract(spec=spec)
    with torch.no_grad():
        expected = net(IMAGES, spec)
        for fused in (True, False):
            for block in small.blocks:
                block.attn.fused_attn = fused
            assert relative_error(small(IMAGES), expected) <= 1e-5


def test_full_size_is_bit_identical_to_the_source(source):
    with torch.no_grad():
        assert torch.equal(SuperNet(source).extract(spec={})(IMAGES), source(IMAGES))


def test_layers_are_stock_timm_of_the_asked_width(family):
    net = make_net(family)
    spec = {"blocks.0.attn": 5, "blocks.0.mlp": 17}
    small = net.extract(spec=spec)
    assert type(small) is type(make_model(family))
    assert not small.training
    for index, (head_dim, hidden) in enumerate([(5, 17), (net.sites[2].width, net.sites[3].width)]):
        attn, mlp = small.blocks[index].attn, small.blocks[index].mlp
        assert (type(attn), type(mlp)) == (Attention, Mlp)
        assert (attn.head_dim, attn.num_heads, attn.scale) == (head_dim, net.sites[0].heads, head_dim**-0.5)
        assert mlp.fc1.out_features == mlp.fc2.in_features == hidden


def test_width_zero_keeps_a_constant_or_nothing(family):
    """Default: one vector that is added to every token. Paper: no numbers at all."""
    spec = {"blocks.0.attn": 0, "blocks.0.mlp": 0}
    dim = make_model(family).embed_dim
    for method, expected in (("default", [dim]), ("mean", [dim]), ("paper", [])):
        small, tokens = make_net(family, method).extract(spec=spec), torch.randn(2, 3, dim)
        for module in (small.blocks[0].attn, small.blocks[0].mlp):
            assert [p.numel() for p in module.parameters()] == expected
            out = module(tokens)
            assert out.shape == tokens.shape
            assert torch.equal(out, out[:1, :1].expand_as(out))
            assert bool(out.any()) == bool(expected)


@pytest.mark.parametrize("method", METHODS)
def test_shares_no_numbers_with_the_super_network(family, method):
    net = make_net(family, method)
    small = net.extract(spec=MIXED)
    ours = {t.data_ptr() for t in (*net.parameters(), *net.buffers()) if t.numel()}
    assert not ours & {t.data_ptr() for t in (*small.parameters(), *small.buffers())}
    assert all(p.is_contiguous() and p.requires_grad and p.is_leaf for p in small.parameters())


def test_shares_no_module_with_the_super_network(family):
    """A hook on the one, or its training mode, must not reach the other."""
    net = make_net(family)
    theirs = {id(module) for module in net.modules()}
    assert [name for name, module in net.extract(spec=MIXED).named_modules() if id(module) in theirs] == []


@pytest.mark.parametrize("fused", [True, False])
def test_choice_of_fused_attention_is_kept(fused):
    source = make_model("plain")
    for block in source.blocks:
        block.attn.fused_attn = fused
    small = SuperNet(source).extract(spec={"blocks.0.attn": 8})
    assert [block.attn.fused_attn for block in small.blocks] == [fused, fused]


def test_super_network_is_left_as_it_was(family):
    net = make_net(family)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.extract(spec=MIXED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_small_model_can_be_trained(family):
    small = make_net(family).extract(spec=MIXED).train()
    small(IMAGES).square().sum().backward()
    assert small.blocks[0].attn.qkv.weight.grad.any()
    assert small.blocks[0].mlp.bias.grad.any()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1)
    before = small.blocks[1].attn.bias.detach().clone()
    optimiser.step()
    assert not torch.equal(small.blocks[1].attn.bias, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_small_model_can_be_measured_by_torchs_counter(context):
    """Users check MACs with it, and most of them under no_grad."""
    small = make_net("plain").extract(spec=MIXED)
    with context(), FlopCounterMode(display=False) as counter:
        small(IMAGES)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_type_of_the_weights(dtype):
    net = SuperNet(make_model("plain", dtype=dtype)).contract(make_batches())
    small = net.extract(spec=MIXED)
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        logits, expected = small(IMAGES.to(dtype)), net(IMAGES.to(dtype), MIXED)
    assert logits.dtype == dtype
    assert relative_error(logits.double(), expected.double()) <= (0.05 if dtype.itemsize == 2 else 1e-12)


def test_dropout_rates_are_kept():
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
    source = timm.create_model("vit_tiny_patch16_224", **size, **rates)
    small = SuperNet(source).extract(spec={"blocks.1.attn": 8, "blocks.1.mlp": 8})
    block, expected = small.blocks[1], source.blocks[1]
    for found in (block, expected):
        assert (found.attn.attn_drop.p, found.attn.proj_drop.p) == (0.2, 0.1)
        assert (found.mlp.drop1.p, found.mlp.drop2.p) == (0.1, 0.1)
        assert found.drop_path1.drop_prob == pytest.approx(0.3)


def test_activation_is_kept():
    source = make_model("plain")
    for block in source.blocks:
        block.mlp.act = torch.nn.ReLU()
    net = SuperNet(source)
    small = net.extract(spec={"blocks.0.mlp": 20})
    assert all(type(block.mlp.act) is torch.nn.ReLU for block in small.blocks)


def test_small_model_says_what_it_is(family):
    net = make_net(family, stratified=True)
    small = net.extract(macs=0.5, verbose=False)
    spec = net.spec(macs=0.5)
    assert small.provenance["spec"] == dict(spec)
    assert small.provenance["macs"] == net.macs(spec)
    assert small.provenance["params"] == sum(p.numel() for p in small.parameters())
    assert small.data_config == net.data_config


def test_asked_got_and_range_are_printed(capsys):
    net = make_net("plain", stratified=True)
    net.extract(macs=0.5)
    printed = capsys.readouterr().err
    assert printed.strip() == str(net.budget(macs=0.5))
    net.extract(macs=0.5, verbose=False)
    assert capsys.readouterr().err == ""


def test_small_model_runs_without_this_library(tmp_path):
    """Pickled whole and read where stratavit cannot be imported; a model with no width 0 is all timm's classes."""
    small = make_net("plain").extract(spec={"blocks.0.attn": 8, "blocks.1.mlp": 8})
    with torch.no_grad():
        torch.save((small, IMAGES, small(IMAGES)), tmp_path / "small.pt")
    script = (
        "import sys, torch; sys.modules['stratavit'] = None\n"
        f"small, images, expected = torch.load({str(tmp_path / 'small.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): assert torch.allclose(small(images), expected, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_extraction_is_fast():
    """Half of DeiT-Base by slicing: the issue asks for 0.5 s on a quiet machine; 3 s allow for a busy one."""
    model = timm.create_model("deit_base_patch16_224", device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    net = SuperNet(model)
    spec = {site.name: site.width // 2 for site in net.sites}
    start = time.perf_counter()
    net.extract(spec=spec)
    assert time.perf_counter() - start < 3
