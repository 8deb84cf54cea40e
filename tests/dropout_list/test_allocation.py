"""Widths at a share of the MACs, and the list through the states."""

import math
from itertools import pairwise

from helpers import FAMILIES, make_model
from hypothesis import given
from hypothesis import strategies as st

from stratavit.dropout_list.allocation import State, allocate, ordered_list
from stratavit.dropout_list.strata import Strata
from stratavit.models.cost import cost_model
from stratavit.models.families import find_sites

COSTS = {name: cost_model(make_model(name), find_sites(make_model(name)), (3, 32, 32)) for name in FAMILIES}
SHARES = st.floats(0.3, 1)


def ratios_of(cost, spread=2.0):
    return st.fixed_dictionaries({site.name: st.floats(-spread, spread) for site in cost.sites})


def full(cost):
    return {site.name: site.width for site in cost.sites}


def floor(cost):
    return {site.name: site.steps[1] for site in cost.sites}


@st.composite
def walks(draw, cost):
    """Nested states and ratios, as a walk leaves them."""
    states, caps = [], full(cost)
    ratios = dict.fromkeys(caps, 0.0)
    for share in sorted(draw(st.lists(SHARES, max_size=3, unique=True)), reverse=True):
        ratios = draw(ratios_of(cost))
        caps = allocate(cost, ratios, share, caps)
        states.append(State(share, caps))
    return states, ratios


@given(data=st.data())
def test_states_nest_within_their_budgets_and_no_unit_more_would_fit(family, data):
    cost = COSTS[family]
    caps = full(cost)
    for state in data.draw(walks(cost))[0]:
        budget, widths = state.share * cost.macs(), state.widths
        assert widths.keys() == caps.keys()
        for site in cost.sites:
            assert widths[site.name] in site.steps[1:]
            assert widths[site.name] <= caps[site.name]
            above = next((step for step in site.steps if step > widths[site.name]), math.inf)
            if above <= caps[site.name]:
                assert cost.macs(widths | {site.name: above}) > budget
        assert cost.macs(widths) <= budget or widths == floor(cost)
        caps = widths


@given(share=SHARES, level=st.floats(-3, 3))
def test_equal_ratios_keep_alike_within_two_units(family, share, level):
    """One unit is rounded down, one may come back; no site gives way but to its floor."""
    cost = COSTS[family]
    widths = allocate(cost, dict.fromkeys(full(cost), level), share, full(cost))
    kept = [widths[site.name] / site.width for site in cost.sites]
    unit = max((b - a) / site.width for site in cost.sites for a, b in pairwise(site.steps))
    assert max(kept) - min(kept) <= 2 * unit + 1e-9


def test_a_larger_ratio_keeps_more(family):
    cost = COSTS[family]
    for site in cost.sites:
        even = dict.fromkeys(full(cost), 0.0)
        more, less = (allocate(cost, even | {site.name: tilt}, 0.85, full(cost)) for tilt in (3.0, -3.0))
        assert more[site.name] > less[site.name]
        assert sum(less.values()) - less[site.name] > sum(more.values()) - more[site.name]


def prefixes_of(strata):
    return [dict(strata.spec(position)) for position in range(len(strata) + 1)]


@given(data=st.data())
def test_the_list_goes_through_the_states_down_to_nothing_one_unit_at_a_time(family, data):
    cost = COSTS[family]
    states, ratios = data.draw(walks(cost))
    entries = ordered_list(cost.sites, states, ratios)
    for site in cost.sites:
        assert [entry.width for entry in entries if entry.site == site.name] == list(reversed(site.steps[:-1]))
    assert [entry.group for entry in entries] == list(range(sum(len(site.steps) - 1 for site in cost.sites)))
    prefixes = prefixes_of(Strata(cost.sites, entries))
    places = [prefixes.index(dict(state.widths)) for state in states]
    assert places == sorted(places)
    assert prefixes.index(floor(cost)) == len(entries) - len(cost.sites)
    last = [ratios[entry.site] for entry in entries[-len(cost.sites) :]]
    assert last == sorted(ratios.values())


@given(data=st.data())
def test_between_two_states_every_site_is_as_far_on_its_way_as_the_others(family, data):
    """In the logarithm of the width, to within the unit that leaves next."""
    cost = COSTS[family]
    states, ratios = data.draw(walks(cost))
    strata = Strata(cost.sites, ordered_list(cost.sites, states, ratios))
    ends = [full(cost), *(dict(state.widths) for state in states), floor(cost)]
    prefixes = prefixes_of(strata)
    for before, after in pairwise(ends):
        moving = [site for site in cost.sites if before[site.name] > after[site.name]]
        for widths in prefixes[prefixes.index(before) : prefixes.index(after) + 1]:
            ways = []  # of the unit that left last and of the one that is next
            for site in moving:
                wide, narrow, width = before[site.name], after[site.name], widths[site.name]

                def way(middle, wide=wide, narrow=narrow):
                    return math.log(wide / middle) / math.log(wide / narrow)

                index = site.steps.index(width)
                left = way((width + site.steps[index + 1]) / 2) if width < wide else -math.inf
                coming = way((width + site.steps[index - 1]) / 2) if width > narrow else math.inf
                ways.append((left, coming))
            assert not ways or max(left for left, _ in ways) <= min(coming for _, coming in ways) + 1e-12


def test_order_solved_on_paper():
    """No state: both sites fall to one unit each, the wider steps of the shorter site at their middles."""
    cost = COSTS["plain"]
    sites = [site for site in cost.sites if site.name.startswith("blocks.0")]
    ratios = {"blocks.0.attn": 0.2, "blocks.0.mlp": 0.1}
    entries = ordered_list(sites, [], ratios)
    attention = [position for position, entry in enumerate(entries) if entry.site == "blocks.0.attn"]
    # 16 -> 8 is one step, at log(16 / 12) / log(2) = 0.415 of the way; of the MLP's 31 steps from 64 to 2 those
    # whose middle lies above 64 * 32 ** -0.415 = 15.2 come first: 63, 61, ..., 17
    assert attention == [24, len(entries) - 1]
    assert entries[-2].site == "blocks.0.mlp"
