"""The list over both axes: it nests, can be merged at every position, and serves the budgets that count tokens."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_net, older

from stratavit import ArtifactError, BudgetError, StrataViTError, SuperNet
from stratavit.dropout_list.joint import Search, chosen_places, interleaved, reachable_merges
from stratavit.dropout_list.strata import Entry
from stratavit.elastic.token_places import check_tokens, place_of
from stratavit.spec import Spec


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
    widths = [Entry("blocks.0.attn", width, group) for group, width in enumerate((24, 16, 8, 0))]
    found = interleaved(widths, places, [(2, (48,)), (3, (48,))])
    assert [(entry.site, entry.width) for entry in found] == [
        ("blocks.0.tokens", 56),
        ("blocks.0.attn", 24),
        ("blocks.0.tokens", 48),
        ("blocks.0.attn", 16),
        ("blocks.0.attn", 8),
        ("blocks.0.attn", 0),
    ]


def test_the_list_goes_through_what_the_search_found(net):
    facts = net.provenance["stratify"]["both_axes"]
    specs = [net.joint_strata.spec(position) for position in range(len(net.joint_strata) + 1)]
    for share, position, counts in facts["states"]:
        spec = {**net.strata.spec(position), **dict(zip(facts["places"], counts, strict=True))}
        assert net.resolve(spec) in [net.resolve(one) for one in specs]
        assert net.macs(spec) <= share * net.macs()


def test_places_are_spread_over_the_depth():
    blocks = lambda depth: [place_of(f"blocks.{n}", 64, 1) for n in range(depth)]  # noqa: E731
    assert [place.block for place in chosen_places(blocks(12), 5)] == [f"blocks.{n}" for n in (1, 3, 5, 7, 9)]
    assert len(chosen_places(blocks(24), 5)) == 10
    assert len(chosen_places(blocks(2), 5)) == 1


def test_the_search_finds_the_best_counts(net):
    """A distance that is known: tokens of the first place are worth much, those of the second nothing."""
    places = [place_of(f"blocks.{n}", 16, 1) for n in range(2)]

    def distance(spec):
        width = sum(spec[site.name] / site.width for site in net.sites)
        return -3 * spec["blocks.0.tokens"] - width

    found = Search(net.cost, places, net.strata, distance).at(0.8)
    assert found["blocks.0.tokens"] == 16
    assert found["blocks.1.tokens"] == 8
    assert net.macs(Spec(found)) <= 0.8 * net.macs()
