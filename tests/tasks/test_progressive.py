"""The progressive list: what is listed never moves, targets are met, importance is measured at the smallest size."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import make_batches, make_net
from hypothesis import given
from hypothesis import strategies as st

from stratavit.dropout_list import sensitivity
from stratavit.dropout_list.strata import Entry, Strata
from stratavit.tasks.progressive_list import Growth, extend, grow

FAST = Growth(reduction=0.7, stages=4)
NAMES = ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]


@pytest.fixture(scope="module")
def net():
    return copy.deepcopy(make_net("plain", "paper"))


@pytest.fixture(scope="module")
def lists(net):
    """The list after each of five epochs, the weights shaken in between as training would."""
    net, found, entries = copy.deepcopy(net), [], []
    generator = torch.Generator().manual_seed(0)
    for epoch in range(5):
        entries = grow(net, make_batches(), entries, epoch, FAST)
        found.append(entries)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found


def dropped(net, entries):
    return net.macs() - net.macs(Strata(net.sites, entries).smallest())


def without_last_group(entries):
    return [entry for entry in entries if entry.group != entries[-1].group]


def test_later_epochs_only_append_groups_of_their_own(net, lists):
    for before, after in pairwise(lists):
        assert after[: len(before)] == before
        assert {e.group for e in before}.isdisjoint(e.group for e in after[len(before) :])
    groups = [entry.group for entry in lists[-1]]
    assert groups == sorted(groups)
    found = Strata(net.sites, lists[-1])
    assert all(small <= large for large, small in pairwise(found.spec(place) for place in range(len(found) + 1)))


def test_targets_are_met_by_less_than_one_group_and_the_list_ends_with_the_last_stage(net, lists):
    for epoch, entries in enumerate(lists):
        assert dropped(net, without_last_group(entries)) < FAST.target(net.macs(), epoch) <= dropped(net, entries)
    assert len(lists[3]) > len(lists[2])
    assert lists[3] == lists[4]


def test_importance_is_measured_at_the_smallest_network(net, monkeypatch):
    """And the network is afterwards as it was."""
    before = copy.deepcopy(net.state_dict())
    entries = grow(net, make_batches(), [], 0, FAST)
    smallest, seen = dict(Strata(net.sites, entries).smallest()), []

    def remember(function):
        def wrapped(model, *args, **kwargs):
            seen.append({name: model.get_submodule(name).width for name in smallest})
            return function(model, *args, **kwargs)

        return wrapped

    for name in ("collect", "bypass_sensitivity"):
        monkeypatch.setattr(sensitivity, name, remember(getattr(sensitivity, name)))
    grow(net, make_batches(), entries, 1, FAST)
    assert seen == [smallest] * 2
    assert all(module.width == module.full_width for module in net.elastic.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_sites_at_width_zero_are_skipped(net):
    entries = [Entry("blocks.0.attn", width, 0) for width in (8, 0)]
    grown = grow(net, make_batches(), entries, 3, FAST)
    assert grown[:2] == entries
    assert all(entry.site != "blocks.0.attn" for entry in grown[2:])


def test_one_epoch_is_the_one_shot_list(net):
    """From the full network, the list is the paper's one-shot list up to the target."""
    one_shot = copy.deepcopy(net).stratify(make_batches(), method="paper").strata
    entries = grow(net, make_batches(), [], 0, Growth(reduction=0.5, stages=1))
    assert tuple(entries) == one_shot.entries[: len(entries)]


def test_an_unreachable_target_lists_all_there_is(net):
    everything = Growth(reduction=1.0, stages=1)
    entries = grow(net, make_batches(), [], 0, everything)
    assert set(Strata(net.sites, entries).smallest().values()) == {0}
    assert grow(net, make_batches(), entries, 0, everything) == entries


@given(st.lists(st.sampled_from(NAMES), max_size=8), st.data())
def test_extend_stops_at_the_first_group_that_reaches_the_target(names, data):
    net = make_net("plain", "paper")
    left = {site.name: list(site.steps[:-1]) for site in net.sites}
    order = []
    for group, name in enumerate(names):
        count = data.draw(st.integers(0, len(left[name])))
        order += [Entry(name, left[name].pop(), group) for _ in range(count)]
    target = data.draw(st.floats(0, net.macs()))
    grown = extend([], order, net.cost, target)
    assert grown == order[: len(grown)]
    assert len(grown) in Strata(net.sites, order).group_ends()
    assert dropped(net, grown) >= target or grown == order
    assert not grown or dropped(net, without_last_group(grown)) < target
