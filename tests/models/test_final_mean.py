"""The mean of what the head reads, put back: interpolation, and that elastic, extracted and stock models agree."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, PLAN, make_batches, make_images, make_model, make_net, relative_error

from stratavit.data.pixels import folds_of, keys_of
from stratavit.dropout_list import marginal_effects, walk
from stratavit.models.families import last_norm
from stratavit.models.final_mean import FinalMean
from stratavit.models.small_model import final_shift

IMAGES = make_images(3, seed=9)
SHIFTED = [name for name in FAMILIES if name != "distilled"]
MEAN = FinalMean((0.7, 0.5, 0.2), torch.tensor([[1.0, -2.0], [3.0, 0.0], [-1.0, 4.0]]))
AT = {  # share -> shift: measured vectors, linear between them, nothing at full size, constant below the last
    **{1.2: [0, 0], 1.0: [0, 0], 0.85: [0.5, -1.0], 0.7: [1, -2], 0.6: [2.0, -1.0], 0.55: [2.5, -0.5], 0.5: [3, 0]},
    **{0.35: [1.0, 2.0], 0.2: [-1, 4], 0.1: [-1, 4], 0.0: [-1, 4]},
}


def cut_of(net):
    return {site.name: site.steps[len(site.steps) // 2] for site in net.sites}


def without(net):
    """A copy that puts nothing back."""
    other = copy.deepcopy(net)
    other.final_mean = None
    return other


def read_by_head(model, images):
    return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("share", AT)
def test_the_shift_at_a_share(share):
    torch.testing.assert_close(MEAN.at(share), torch.tensor(AT[share], dtype=torch.float32))


@pytest.mark.parametrize("name", SHIFTED)
def test_what_the_head_reads_is_shifted_by_the_interpolated_vector_alone(name):
    """In the super-network by a hook, in a small model by the bias of its last norm, which has no hook."""
    net = make_net(name, stratified=True)
    bare = without(net)
    states = net.provenance["stratify"]["states"]
    assert net.final_mean.shares == tuple(net.macs(widths) / net.macs() for _, widths in states)
    for spec in (net.spec(macs=0.6), net.spec(macs=0.95), dict.fromkeys(cut_of(net), 0)):
        expected = net.final_mean.at(net.macs(spec) / net.macs())
        small, other = net.extract(spec=spec), bare.extract(spec=spec)
        with torch.no_grad():
            found = read_by_head(small, IMAGES) - read_by_head(other, IMAGES)
            assert relative_error(net(IMAGES, spec), small(IMAGES)) <= 1e-5
            assert relative_error(net(IMAGES, spec), bare(IMAGES, spec)) > 1e-3
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last_norm(small).bias - last_norm(other).bias, expected, rtol=1e-4, atol=1e-6)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert last_norm(small) is (small.fc_norm if name == "avg_pool" else small.norm)


@pytest.mark.parametrize("name", SHIFTED)
def test_measured_vectors_bring_the_mean_back_to_the_dense_models(name):
    """On the images and with the moments it was measured with: the last step of each state has fold 1, then 0."""
    net = copy.deepcopy(make_net(name))
    images = torch.cat([images for images, _ in make_batches()])
    states, _, mean = walk.walk(net.model, net.sites, net.cost, make_batches(), PLAN)
    for fold, state, vector in zip((1, 0)[: len(states)], states, mean.vectors, strict=True):
        assert net.cost.macs(state.widths) <= state.share * net.macs()
        seen = images[folds_of(keys_of(images)) == fold]
        with torch.no_grad(), marginal_effects.crossed(net.model, fold):
            dense = read_by_head(net.extract(spec={}), seen).mean(dim=0)
            plain = read_by_head(net.extract(spec=state.widths), seen).mean(dim=0)
            assert relative_error(vector, dense - plain) <= 1e-3
            net.final_mean = FinalMean((net.macs(state.widths) / net.macs(),), vector[None])
            shifted = read_by_head(net.extract(spec=state.widths), seen).mean(dim=0)
            net.final_mean = None
        assert (shifted - dense).norm() <= 1e-3 * (plain - dense).norm()


def test_full_width_and_state_dict_stay_as_they_are_also_after_a_cut(family):
    net, source = copy.deepcopy(make_net(family, stratified=True)), make_model(family)
    with torch.no_grad():
        expected = without(net)(IMAGES)
        net(IMAGES, cut_of(net))
        assert torch.equal(net(IMAGES), expected)
        assert torch.equal(net.extract(spec={})(IMAGES), expected)
        with net.at(cut_of(net)) as model:
            assert not torch.equal(model(IMAGES), expected)
        assert torch.equal(net.model(IMAGES), expected)
    found, stock = net.model.state_dict(), source.state_dict()
    assert list(found) == list(stock)
    assert all(torch.equal(found[key], stock[key]) for key in found if key.startswith(("norm", "fc_norm")))


def test_two_heads_and_norms_without_bias_have_none():
    assert make_net("distilled", stratified=True).final_mean is None
    model = make_model("plain")
    model.norm = torch.nn.LayerNorm(32, bias=False)
    assert last_norm(model) is None


@pytest.mark.parametrize("change", ["mean", "none", "a new list"])
def test_it_goes_with_the_default_list_and_full_compensation_only(change):
    net = copy.deepcopy(make_net("plain", stratified=True))
    spec = cut_of(net)
    if change == "a new list":
        net.stratify(make_batches(), method="paper")
        assert net.final_mean is None
    else:
        net.compensation = change
    assert final_shift(net, net.resolve(spec)) is None
    with torch.no_grad():
        assert torch.equal(net(IMAGES, spec), without(net)(IMAGES, spec))
        assert torch.equal(net.extract(spec=spec)(IMAGES), without(net).extract(spec=spec)(IMAGES))


def test_a_copy_of_a_network_has_a_shift_of_its_own():
    net = copy.deepcopy(make_net("plain", stratified=True))
    other, spec = copy.deepcopy(net), cut_of(net)
    with torch.no_grad():
        expected = net(IMAGES, spec)
        with net.at(spec):
            assert torch.equal(net.model(IMAGES), expected)
            assert torch.equal(other.model(IMAGES), other(IMAGES))  # the copy does not see what the first runs at
        assert torch.equal(other(IMAGES, spec), expected)
        other.final_mean = replace(other.final_mean, vectors=other.final_mean.vectors * 3)
        assert not torch.allclose(other(IMAGES, spec), expected)
        assert torch.equal(net(IMAGES, spec), expected)


def test_hooks_on_the_norm_of_a_small_model_do_not_reach_the_network():
    """Gradients reach the norm of both."""
    net = copy.deepcopy(make_net("plain", stratified=True))
    small, called = net.extract(macs=0.6, verbose=False), []
    small.norm.register_forward_hook(lambda *_: called.append("after"))
    small.norm.register_forward_pre_hook(lambda *_: called.append("before"))
    small.norm.register_full_backward_hook(lambda *_: called.append("backward"))
    net(IMAGES, cut_of(net)).square().sum().backward()
    assert net.model.norm.weight.grad.all()
    assert net.model.norm.bias.grad.all()
    assert called == []
    small(IMAGES).sum().backward()
    assert called == ["before", "after", "backward"]
