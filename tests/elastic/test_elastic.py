"""Elastic execution: any prefix of the channels, from one set of weights, with gradients into it."""

import copy

import pytest
import torch
from helpers import (
    make_batches,
    make_images,
    make_model,
    make_net,
    masked,
    measured_means,
    out_layers,
    relative_error,
    spec_strategy,
    stock_copy,
)
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp

from stratavit import SuperNet
from stratavit.elastic.mlp import ElasticMlp

IMAGES = make_images(2, seed=9)
MASKED = ["mean", "paper"]  # what switching channels off in the stock model can show


def reference(family, method, spec):
    """The stock model with the network's weights, cut channels switched off by hooks."""
    stock = stock_copy(make_model(family), make_net(family, method))
    images = torch.cat([images for images, _ in make_batches()])
    return masked(stock, spec, measured_means(stock, images) if method == "mean" else None)


def test_full_width_is_bit_identical_to_the_source(source, images):
    net = SuperNet(source)
    with torch.no_grad():
        assert torch.equal(net(images), source(images))
        assert torch.equal(net(images, {site.name: site.width for site in net.sites}), source(images))


def test_full_width_is_bit_identical_when_training(source, images):
    """Dropout and drop-path included: the same random numbers are drawn in the same order."""
    for module in source.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    net = SuperNet(source).train()
    source.train()
    torch.manual_seed(0)
    expected = source(images)
    torch.manual_seed(0)
    assert torch.equal(net(images), expected)
    assert not torch.equal(net(images), expected)  # dropout was on


@pytest.mark.parametrize("method", MASKED)
@given(data=st.data())
def test_elastic_equals_masked(family, method, data):
    spec = data.draw(spec_strategy(family))
    with torch.no_grad():
        assert relative_error(make_net(family, method)(IMAGES, spec), reference(family, method, spec)(IMAGES)) <= 1e-5


def test_compensations_differ_and_only_where_something_is_cut(family):
    nets = {}
    for compensation in ("full", "mean", "none"):
        nets[compensation] = copy.deepcopy(make_net(family))
        nets[compensation].compensation = compensation
    with torch.no_grad():
        for net in nets.values():
            assert torch.equal(net(IMAGES), make_net(family)(IMAGES))
        for site in net.sites:
            for width, number in ((site.width // 2, 3), (0, 2)):  # with nothing kept, the mean is all there is to say
                answers = [net(IMAGES, {site.name: width}) for net in nets.values()]
                assert torch.equal(answers[0], answers[1]) == (width == 0)
                assert not any(torch.allclose(answer, answers[-1]) for answer in answers[:-1])
                assert len(torch.unique(torch.stack(answers), dim=0)) == number


def kept_parts(net, spec, method):
    """Parameter name -> which of its entries a prefix uses, from widths alone; all of what is no site's."""
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.model.named_parameters()}
    for site in net.sites:
        width = spec.get(site.name, site.width)
        alive = (torch.arange(site.width) < width).repeat(site.heads)
        first, second, copies = ("qkv", "proj", 3) if site.kind == "attention" else ("fc1", "fc2", 1)
        for leaf in ("weight", "bias"):
            if f"{site.name}.{first}.{leaf}" in kept:
                mask = kept[f"{site.name}.{first}.{leaf}"]
                mask &= alive.repeat(copies).view(-1, *[1] * (mask.dim() - 1))
        kept[f"{site.name}.{second}.weight"] &= alive
        if width == 0 and method == "paper" and site.out_bias:
            kept[f"{site.name}.{second}.bias"][:] = False
        if width == 0:  # nothing comes in, so the norm and what LayerScale multiplies are not used or constant
            norm = site.name.replace("attn", "norm1").replace("mlp", "norm2")
            kept[f"{norm}.weight"][:] = kept[f"{norm}.bias"][:] = False
    return kept


@pytest.mark.parametrize("method", MASKED)
@given(data=st.data())
def test_gradients_reach_exactly_the_kept_slices(family, method, data):
    """Equal to those of the masked model inside, zero outside (also where the mean of what is cut is added)."""
    spec = data.draw(spec_strategy(family))
    net, stock = make_net(family, method), reference(family, method, spec)
    net.zero_grad()
    for model, arguments in ((net, (IMAGES, spec)), (stock, (IMAGES,))):
        model(*arguments).square().sum().backward()
    kept = kept_parts(net, spec, method)
    expected = dict(stock.named_parameters())
    for name, parameter in net.model.named_parameters():
        zeros = torch.zeros_like(parameter)
        found, wanted = (zeros if p.grad is None else p.grad for p in (parameter, expected[name]))
        assert not found[~kept[name]].any(), f"{name}: gradient outside the kept slice"
        wanted = wanted * kept[name]
        scale = max(float(wanted.abs().max()), 1e-2)
        assert float((found - wanted).abs().max()) <= 1e-4 * scale, name


def test_gradients_reach_every_kept_channel():
    """So that the test above does not compare zeros with zeros."""
    net = make_net("plain", "mean")
    net.zero_grad()
    net(IMAGES, {"blocks.0.attn": 5, "blocks.0.mlp": 40}).square().sum().backward()
    attn, mlp = net.elastic["blocks.0.attn"], net.elastic["blocks.0.mlp"]
    assert attn.qkv.weight.grad.view(3, 2, 16, 32)[:, :, :5].abs().amin() > 0
    assert not attn.qkv.weight.grad.view(3, 2, 16, 32)[:, :, 5:].any()
    assert mlp.fc1.weight.grad[:40].abs().amin() > 0
    assert mlp.fc2.weight.grad[:, :40].abs().amin() > 0
    assert not mlp.fc2.weight.grad[:, 40:].any()


def test_an_uncalibrated_network_has_the_stock_state_dict_and_keeps_the_plain_bias(source):
    net = SuperNet(source)
    assert list(net.model.state_dict()) == list(source.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.model.state_dict().items())
    for name, module in net.elastic.items():
        bias, expected = module.out_bias_at(0), out_layers(source)[name].bias
        assert (bias is None) == (expected is None)
        assert bias is None or torch.equal(bias, expected)


def test_an_mlp_that_widens_tokens_is_left_whole():
    assert ElasticMlp.refusal(Mlp(8, 16, 8)) is None
    assert ElasticMlp.refusal(Mlp(8, 16, 12))[0] == "fc2"
