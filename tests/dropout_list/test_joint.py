"""The list over both axes: it nests, can be merged at every position, and serves the budgets that count tokens."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_net, older

from stratavit import ArtifactError, BudgetError, StrataViTError, SuperNet
from stratavit.dropout_list.allocation import State, ordered_list
from stratavit.dropout_list.joint import Search, chosen_places, reachable_merges
from stratavit.dropout_list.strata import Entry
from stratavit.elastic.site import Site
from stratavit.elastic.token_places import check_tokens, place_of
from stratavit.spec import Spec


def reading(net):
    """The cost of a network whose outputs read the patches behind the last block."""
    return replace(net.cost, places=(net.cost.places[0], place_of("blocks.1", 16, 1)))


@pytest.fixture(scope="module")
def net():
    return copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))


def test_every_position_nests_and_can_run(net):
    specs = [net.joint_strata.spec(position) for position in range(len(net.joint_strata) + 1)]
    assert any(entry.site.endswith(".tokens") for entry in net.joint_strata.entries)
    for larger, smaller in pairwise(specs):
        assert smaller <= larger
        assert net.macs(smaller) <= net.macs(larger)
        check_tokens(net.cost.places, smaller)
    assert net.joint_strata.smallest().keys() >= net.resolve(None).keys()


def test_the_width_list_is_the_one_that_is_made_alone(net):
    alone = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN)
    assert alone.strata.entries == net.strata.entries
    assert alone.joint_strata is None


def test_the_same_images_make_the_same_list(net):
    again = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("tokens", "width"))
    assert again.joint_strata.entries == net.joint_strata.entries


def test_budgets_take_the_list_of_their_axes(net):
    merges = lambda **asked: any(n < 16 for name, n in net.spec(**asked).items() if name.endswith(".tokens"))  # noqa: E731
    assert merges(macs=0.6)
    assert merges(macs=0.6, axes="both")
    assert not merges(macs=0.6, axes="width")
    assert not merges(params=0.6)
    assert not merges(macs=0.9, params=0.6)
    assert net.macs(net.spec(macs=0.6)) <= 0.6 * net.macs()
    with pytest.raises(BudgetError, match="axes"):
        net.spec(macs=0.6, axes="depth")
    with pytest.raises(BudgetError, match="axes"):
        make_net("plain", stratified=True).spec(macs=0.6, axes="both")


@pytest.mark.parametrize("axes", [("tokens",), "tokens", (), None, 5, ("width", "depth"), ("width", "width")])
def test_unknown_axes(axes):
    with pytest.raises(StrataViTError, match="axes"):
        make_net("plain").stratify(make_batches(), axes=axes)


def test_saved_and_read_back(net, tmp_path):
    net.save(tmp_path / "run")
    again = SuperNet.load(tmp_path / "run")
    assert again.joint_strata.entries == net.joint_strata.entries
    images, spec = make_images(2), net.spec(macs=0.6)
    with torch.no_grad():
        assert torch.equal(again(images, spec), net(images, spec))


@pytest.mark.parametrize(
    "damage", [{"patches": 10**9}, {"patches": "16"}, {"patches": 64}, {"joint_strata": []}, {"strata": None}]
)
def test_a_damaged_list_is_refused(net, tmp_path, damage):
    net.save(tmp_path / "run")
    older(tmp_path / "run", lambda content: content.update(damage))
    with pytest.raises(ArtifactError, match=r"patches|dropout list|strata"):
        SuperNet.load(tmp_path / "run")


def test_a_new_list_replaces_both(net):
    changed = copy.deepcopy(net).stratify(make_batches(), plan=PLAN)
    assert changed.joint_strata is None
    changed = copy.deepcopy(net)
    changed.set_units(4, 8)
    assert changed.joint_strata is None


def test_merges_wait_until_they_can_be_done():
    places = [place_of(f"blocks.{n}", 64, 1) for n in range(2)]
    entries = [Entry("blocks.1.tokens", 16, 0), Entry("blocks.0.attn", 8, 1), Entry("blocks.0.tokens", 32, 2)]
    assert [entry.site for entry in reachable_merges(entries, places)] == [
        "blocks.0.attn",
        "blocks.0.tokens",
        "blocks.1.tokens",
    ]


def test_units_leave_in_turns_between_two_states():
    places = [place_of("blocks.0", 64, 1)]
    site = Site("blocks.0.attn", "attention", 32, 1, 32, 3, True, steps=(0, 8, 16, 24, 32), maps=3)
    states = [State(0.5, {site.name: 16, "blocks.0.tokens": 48})]
    found = ordered_list([site], states, {site.name: 0.0}, places)
    assert [(entry.site, entry.width) for entry in found] == [
        ("blocks.0.attn", 24),
        ("blocks.0.tokens", 56),
        ("blocks.0.attn", 16),
        ("blocks.0.tokens", 48),
        ("blocks.0.attn", 8),
        ("blocks.0.attn", 0),
    ]


def test_the_list_goes_through_what_the_search_found(net):
    facts = net.provenance["stratify"]["both_axes"]
    specs = [net.joint_strata.spec(position) for position in range(len(net.joint_strata) + 1)]
    assert len(facts["states"]) > 1
    for share, widths in facts["states"]:
        assert net.resolve(widths) in [net.resolve(one) for one in specs]
        assert net.macs(widths) <= share * net.macs()


def test_modules_behind_a_merge_keep_more_than_the_width_list_says(net):
    """Their channels cost fewer MACs, and those in front of it make room."""
    place, budget = place_of("blocks.1", 16, 1), 0.6 * net.macs()
    listed, found = (
        {
            tokens: Search(reading(net), [place], net.strata, len, cheapness=power).spec((tokens,), budget)
            for tokens in (8, 16)
        }
        for power in (0, 1)
    )
    assert found[8]["blocks.0.mlp"] < listed[8]["blocks.0.mlp"]
    assert found[8]["blocks.1.mlp"] > listed[8]["blocks.1.mlp"]
    assert found[16] == listed[16]


def test_a_move_must_be_better_on_the_larger_set_too(net):
    places = [place_of(f"blocks.{n}", 16, 1) for n in range(2)]
    misled, right = (lambda spec: spec["blocks.0.tokens"]), (lambda spec: 20 - spec["blocks.0.tokens"])
    assert Search(net.cost, places, net.strata, misled).at(0.8)["blocks.0.tokens"] < 16
    assert Search(net.cost, places, net.strata, misled, right).at(0.8)["blocks.0.tokens"] == 16


def test_places_are_spread_over_the_depth():
    blocks = lambda depth: [place_of(f"blocks.{n}", 64, 1) for n in range(depth)]  # noqa: E731
    for depth in (11, 12):  # with the last block or without it
        assert [place.block for place in chosen_places(blocks(depth))] == [f"blocks.{n}" for n in (1, 3, 5, 7, 9)]
    assert len(chosen_places(blocks(24))) == 10
    assert len(chosen_places(blocks(2))) == 1
    assert chosen_places([]) == []
    for number in range(1, 13):
        found = [int(place.block.split(".")[1]) for place in chosen_places(blocks(12), number)]
        assert len({*found}) == number
        assert {b - a for a, b in pairwise(found)} <= {11 // number, 11 // number + 1}


def test_the_number_of_places_may_be_said(net):
    made = copy.deepcopy(make_net("plain")).stratify(
        make_batches(), plan=PLAN, axes=("width", "tokens"), merging_places=1
    )
    assert made.provenance["stratify"]["both_axes"]["tokens"]["places"] == 1
    assert made.joint_strata.entries == net.joint_strata.entries
    for wrong in (0, 2, -1, 1.0, True, "1"):
        with pytest.raises(StrataViTError, match="merging_places"):
            make_net("plain").stratify(make_batches(), plan=PLAN, axes=("width", "tokens"), merging_places=wrong)
    with pytest.raises(StrataViTError, match="merging_places"):
        make_net("plain").stratify(make_batches(), plan=PLAN, merging_places=1)


def test_the_search_finds_the_best_counts(net):
    """A distance that is known: tokens of the first place are worth much, those of the second nothing."""
    places = [place_of(f"blocks.{n}", 16, 1) for n in range(2)]

    def distance(spec):
        width = sum(spec[site.name] / site.width for site in net.sites)
        return 100 - 3 * spec["blocks.0.tokens"] - width

    found = Search(reading(net), places, net.strata, distance).at(0.8)
    assert found["blocks.0.tokens"] == 16
    assert found["blocks.1.tokens"] == 8
    assert net.macs(Spec(found)) <= 0.8 * net.macs()


def test_tokens_are_merged_where_widths_may_not_fall():
    """Floors keep widths from a size that fewer tokens still reach."""
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, min_width=0.5)
    search = Search(reading(net), reading(net).places[1:], net.strata, lambda spec: 0.0)
    assert net.macs(net.strata.smallest()) > 0.6 * net.macs()
    assert search.reaches(0.6)
    assert not search.reaches(0.5)
    assert net.macs(search.at(0.6)) <= 0.6 * net.macs()


def test_the_search_begins_with_counts_that_fit(net):
    """Where no width suffices for all tokens, the fewest merges that do, at the places that cost least."""
    places = [place_of(f"blocks.{n}", 16, 1) for n in range(2)]
    search = Search(net.cost, places, net.strata, lambda spec: -spec["blocks.0.tokens"])
    search.spec = lambda counts, budget: None if sum(counts) > budget else dict(zip("ab", counts, strict=True))
    assert search.fewest() == (8, 8)
    assert search.fitting(32, len) == (16, 16)
    assert search.fitting(24, lambda counts: -counts[0]) == (16, 8)
