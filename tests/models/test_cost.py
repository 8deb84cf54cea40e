"""MACs and parameters, against torch's own counter and published figures."""

import pytest
import timm
import torch
from helpers import METHODS, make_images, make_model, make_net, spec_strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from stratavit import SuperNet
from stratavit.models.cost import cost_model
from stratavit.models.families import find_sites

PUBLISHED = {"deit_tiny": (1.075, 5_717_416), "deit_small": (4.241, 22_050_664), "deit_base": (16.849, 86_567_656)}


def counted_macs(model):
    """MACs of one image: (without, with) the products of q and k and of attention and v."""
    for block in model.blocks:
        block.attn.fused_attn = False  # so that both products are matrix products
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(make_images(1))
    counts = counter.get_flop_counts()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    flops = sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in linear)
    assert flops % 2 == 0  # the counter counts a multiplication and an addition
    return flops // 2, counter.get_total_flops() // 2


@settings(max_examples=8)
@given(data=st.data())
def test_macs_equal_torchs_counter(family, data):
    net, spec = make_net(family), data.draw(spec_strategy(family))
    assert (net.macs(spec), net.macs(spec, attention=True)) == counted_macs(net.extract(spec=spec))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(data=st.data())
def test_params_equal_the_extracted_models(family, method, data):
    net, spec = make_net(family, method), data.draw(spec_strategy(family))
    assert net.params(spec) == sum(p.numel() for p in net.extract(spec=spec).parameters())


@pytest.mark.parametrize("method", ["default", "paper"])
def test_costs_before_any_calibration(source, method):
    net = SuperNet(source)
    net.method = method
    assert (net.macs(), net.macs(attention=True)) == counted_macs(source)
    for width in (None, 0, 8):
        spec = {} if width is None else dict.fromkeys(net.resolve(None), width)
        small = net.extract(spec=spec) if spec else source
        assert net.params(spec) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_of_deit(name):
    """Linear MACs as in ../shared/method.md; parameters as timm counts them."""
    model = timm.create_model(f"{name}_patch16_224", device="meta")
    cost = cost_model(model, find_sites(model), (3, 224, 224))
    assert (round(cost.macs() / 1e9, 3), cost.params()) == PUBLISHED[name]
    assert set(cost.tokens.values()) == set(cost.context.values()) == {197}
    if name == "deit_base":
        assert round(cost.macs(attention=True) / 1e9, 3) == 17.564


def test_sites_that_are_not_named_count_at_full_width():
    net = make_net("plain")
    assert net.macs({}) == net.macs() == net.macs(net.resolve(None))
    assert net.macs() - net.macs({"blocks.0.mlp": 63}) == 2 * 17 * 32
    assert net.macs() - net.macs({"blocks.1.attn": 15}) == 4 * 17 * 32 * 2


@pytest.mark.parametrize("training", [True, False])
def test_measuring_does_not_change_the_model(training):
    model = make_model("plain").train(training)
    cost_model(model, find_sites(model), (3, 32, 32))
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
