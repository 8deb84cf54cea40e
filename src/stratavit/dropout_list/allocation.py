"""How many channels each site keeps at a size: keep ratios that meet a share of the MACs, and the list between sizes.

Pure functions on numbers. A *state* is a size at which ratios were measured; states nest, and between two of them
units are dropped in an interpolated order, so that every prefix of the list is a sensible network.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stratavit.dropout_list.strata import Entry
from stratavit.elastic.site import Site
from stratavit.elastic.token_places import SiteOrPlace, TokenPlace
from stratavit.models.cost import CostModel


@dataclass(frozen=True)
class State:
    """Widths at one size.

    Attributes:
        share: Of the dense model's MACs that was asked for.
        widths: Kept width of every site, and tokens of every place that merges some, each a unit's end.
    """

    share: float
    widths: Mapping[str, int]


def allocate(cost: CostModel, ratios: Mapping[str, float], share: float, caps: Mapping[str, int]) -> dict[str, int]:
    """Widths whose keep ratios are ``exp(ratios + t)``, with t such that the share of the MACs is met, never passed.

    Widths are rounded down to units' ends, at least one unit and the site's floor; then units come back as long as they
    fit, the one with the largest fraction cut off first.

    Args:
        cost: Of the model.
        ratios: Logarithm of each site's keep ratio, up to a common constant.
        share: Of the dense MACs; passed only where the least widths are more.
        caps: Largest width of each site: that of the state before, so that states nest.

    Returns:
        Site name -> width.
    """
    budget, sites = share * cost.macs(), cost.sites
    each = {site.name: cost.each(site) for site in sites}
    start = cost.fixed_macs + sum(cost.site_macs(site, 1) - each[site.name] for site in sites)

    def exact(t: float) -> dict[str, float]:
        return {
            site.name: min(caps[site.name], max(site.least, site.width * math.exp(min(0.0, ratios[site.name] + t))))
            for site in sites
        }

    low, high = min(-ratio for ratio in ratios.values()) - 12.0, max(-ratio for ratio in ratios.values()) + 1e-9
    for _ in range(60):
        middle, wanted = (low + high) / 2, exact((low + high) / 2)
        fits = start + sum(each[site.name] * wanted[site.name] for site in sites) <= budget
        low, high = (middle, high) if fits else (low, middle)
    wanted = exact(low)
    widths = {site.name: _rounded_down(site, wanted[site.name]) for site in sites}
    over = {site.name: (wanted[site.name] - widths[site.name]) / _unit_above(site, widths[site.name]) for site in sites}
    widths = _within(cost, widths, budget)
    return _fill(cost, widths, budget, caps, sorted(sites, key=lambda site: -over[site.name]))


def _rounded_down(site: Site, width: float) -> int:
    return max(site.last_unit, site.steps[bisect_right(site.steps, width + 1e-9) - 1])


def _unit_above(site: Site, width: int) -> int:
    """Size of the unit that begins at a width; of the last unit at the full width."""
    index = min(site.steps.index(width), len(site.steps) - 2)
    return site.steps[index + 1] - site.steps[index]


def _within(cost: CostModel, widths: dict[str, int], budget: float) -> dict[str, int]:
    """Drops units of the sites that keep most, should rounding up to one unit each have passed the budget."""
    while cost.macs(widths) > budget:
        sites = [site for site in cost.sites if widths[site.name] > site.last_unit]
        if not sites:
            break
        site = max(sites, key=lambda site: widths[site.name] / site.width)
        widths[site.name] = site.steps[site.steps.index(widths[site.name]) - 1]
    return widths


def _fill(
    cost: CostModel, widths: dict[str, int], budget: float, caps: Mapping[str, int], order: Sequence[Site]
) -> dict[str, int]:
    """Restores units in turn, as long as one fits."""
    filled = True
    while filled:
        filled = False
        for site in order:
            larger = widths | {site.name: widths[site.name] + _unit_above(site, widths[site.name])}
            if larger[site.name] <= caps[site.name] and cost.macs(larger) <= budget:
                widths, filled = larger, True
    return widths


def ordered_list(
    sites: Sequence[Site], states: Sequence[State], ratios: Mapping[str, float], places: Sequence[TokenPlace] = ()
) -> list[Entry]:
    """The full dropout list through the states, from full to nothing or the floors, one unit an entry.

    Between two states a unit's place is the share of its site's way, in the logarithm of the width, at which it is
    dropped. Below the last state all sites shrink in proportion to one unit each; those are dropped last, the site with
    the smallest ratio first.

    Args:
        sites: The sites of the model.
        states: Nested, largest first.
        ratios: Of the last state, see `allocate`.
        places: Where the states merge tokens; below the last state no more are merged.

    Returns:
        The entries, each a group of its own.
    """
    units: list[SiteOrPlace] = [*sites, *places]
    full = State(1.0, {unit.name: unit.width for unit in units})
    last = {**full.widths, **(states[-1].widths if states else {})}
    floor = State(0.0, {**last, **{site.name: site.last_unit for site in sites}})
    dropped: list[tuple[str, int]] = []
    for before, after in pairwise([full, *states, floor]):
        leaving = []
        for number, site in enumerate(units):
            wide, narrow = before.widths[site.name], after.widths[site.name]
            for low, high in pairwise(step for step in site.steps if narrow <= step <= wide):
                place = math.log(2 * wide / (low + high)) / math.log(wide / narrow)
                leaving.append((place, number, -low))
        dropped += [(units[number].name, -low) for _, number, low in sorted(leaving)]
    whole = (site for site in sites if site.least == 0)
    dropped += [(site.name, 0) for site in sorted(whole, key=lambda site: ratios[site.name])]
    return [Entry(name, width, group) for group, (name, width) in enumerate(dropped)]
