"""The dropout list: importance of units, tail merging, and what is read from a file."""

import json
from itertools import pairwise

import pytest
from helpers import make_net
from hypothesis import given
from hypothesis import strategies as st

from stratavit import ArtifactError
from stratavit.dropout_list.strata import Entry, Strata, removal_order, tail_candidates
from stratavit.elastic.site import Site, attention_steps, mlp_steps
from stratavit.models.cost import site_macs

TOKENS = 5
ATTENTION = Site("a", "attention", 16, heads=2, dim=4, in_biases=3, out_bias=True, steps=attention_steps(16), maps=3)
MLP = Site("m", "mlp", 50, heads=1, dim=4, in_biases=1, out_bias=True, steps=mlp_steps(50), maps=1)
SITES = (ATTENTION, MLP)
COUNTS = {site.name: len(site.steps) - 1 for site in SITES}
IMPORTANCE = st.fixed_dictionaries(
    {name: st.lists(st.floats(0, 10), min_size=count, max_size=count) for name, count in COUNTS.items()}
)


def price_of(tokens):
    return lambda site, width: site_macs(site, width, tokens)


@pytest.mark.parametrize(
    ("importance", "macs", "expected"),
    [
        # equal costs; tails of 4, 1, 2, 3 have the densities 10/4, 6/3, 5/2, 3: only the first two fall
        ([4, 1, 2, 3], [1, 1, 1, 1], [(0, 2.5), (1, 2.0)]),
        ([4, 3, 2, 1], [1, 1, 1, 1], [(0, 2.5), (1, 2.0), (2, 1.5), (3, 1.0)]),
        ([1, 2, 3], [1, 1, 1], [(0, 2.0)]),
        ([1, 1], [1, 1], [(0, 1.0), (1, 1.0)]),  # equal densities are candidates
        ([2, 2], [1, 3], [(0, 1.0), (1, 2 / 3)]),  # expensive units are dropped sooner
        ([2, 2], [3, 1], [(0, 1.0)]),
    ],
)
def test_tail_merging_solved_on_paper(importance, macs, expected):
    assert tail_candidates(importance, macs) == expected


def test_what_is_expensive_is_dropped_first():
    """Alike but for their price: the unit that costs twice as much goes before the other."""
    x, y = (Site(name, "mlp", 20, 1, 1, 0, False, steps=(0, 10, 20), maps=1) for name in "xy")
    prices = {"x": (0.0, 10.0, 30.0), "y": (0.0, 10.0, 20.0)}
    found = removal_order((x, y), {"x": [2.0, 1.0], "y": [2.0, 1.0]}, lambda s, w: prices[s.name][w // 10])
    assert [(entry.site, entry.width) for entry in found] == [("x", 10), ("y", 10), ("x", 0), ("y", 0)]


def test_order_of_two_modules_solved_on_paper():
    """Costs: a unit of "x" 2 * 1 * 1 * 10 = 20 MACs, alike in "y". Densities x: 9/40, 1/20; y: 6/40 alone.

    x's last unit (1/20) goes first; all of y goes (6/40), its last unit first; then the rest of x (9/40).
    """
    x, y = (Site(name, "mlp", 20, 1, 1, 0, False, steps=(0, 10, 20), maps=1) for name in "xy")
    found = removal_order((x, y), {"x": [8.0, 1.0], "y": [2.0, 4.0]}, price_of(1), first_group=5)
    assert [(entry.site, entry.width) for entry in found] == [("x", 10), ("y", 10), ("y", 0), ("x", 0)]
    groups = [entry.group for entry in found]
    assert groups[1] == groups[2]
    assert len(set(groups)) == 3
    assert min(groups) >= 5


@given(IMPORTANCE)
def test_groups_are_runs_of_one_site_in_ascending_density_down_to_nothing(importance):
    """Every unit is dropped once, tail first; a group's density is that of its full tail, computed from the widths."""
    strata = Strata(SITES, removal_order(SITES, importance, price_of(TOKENS)))
    ends, by_name, seen, densities = strata.group_ends(), {site.name: site for site in SITES}, set(), []
    assert (ends[0], ends[-1]) == (0, len(strata))
    for start, end in pairwise(ends):
        ((name, group),) = {(entry.site, entry.group) for entry in strata.entries[start:end]}
        assert group not in seen
        seen.add(group)
        site = by_name[name]
        first = site.steps.index(strata.entries[end - 1].width)
        macs = site_macs(site, site.width, TOKENS) - site_macs(site, site.steps[first], TOKENS)
        densities.append(sum(importance[name][first:]) / macs)
    assert all(a <= b + 1e-12 for a, b in pairwise(densities))
    for site in SITES:
        widths = [entry.width for entry in strata.entries if entry.site == site.name]
        assert widths == list(reversed(site.steps[:-1]))
    specs = [strata.spec(position) for position in range(len(strata) + 1)]
    assert (specs[0], specs[-1], strata.smallest()) == ({"a": 16, "m": 50}, {"a": 0, "m": 0}, {"a": 0, "m": 0})
    assert all(smaller <= larger and not larger <= smaller for larger, smaller in pairwise(specs))
    assert Strata.from_json(SITES, json.loads(json.dumps(strata.to_json()))).entries == strata.entries


def test_a_list_that_is_cut_short_is_allowed():
    strata = Strata(SITES, [Entry("m", 48, 0)])
    assert strata.spec(1) == {"a": 16, "m": 48}
    assert strata.group_ends() == [0, 1]
    assert Strata(SITES, []).group_ends() == [0]


BAD = {
    "not a list": ({}, "entry 0"),
    "short row": ([["a", 8]], "entry 0"),
    "fraction": ([["a", 8.0, 0]], "entry 0"),
    "unknown site later": ([["a", 8, 0], ["b", 8, 1]], "entry 1 .*'b'"),
    "does not shrink": ([["a", 8, 0], ["a", 8, 1]], "entry 1 .*width 8"),
    "full width": ([["a", 16, 0]], "below 16"),
    "negative": ([["a", -8, 0]], "width -8"),
    "inside a unit": ([["a", 5, 0]], "width 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_refused_by_entry(case):
    rows, words = BAD[case]
    with pytest.raises(ArtifactError, match=f"dropout list: .*{words}"):
        Strata.from_json(SITES, rows)


def test_list_of_a_real_network_reaches_every_unit(family):
    net = make_net(family, stratified=True)
    assert len(net.strata) == sum(len(site.steps) - 1 for site in net.sites)
    assert set(net.strata.spec(len(net.strata)).values()) == {0}
    macs = [net.macs(net.strata.spec(position)) for position in range(len(net.strata) + 1)]
    assert all(a > b for a, b in pairwise(macs))
