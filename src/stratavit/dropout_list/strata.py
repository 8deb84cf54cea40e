"""The dropout list: every unit of every site, in order of removal. A prefix of it is a `Spec`.

Source: method section 2 (arXiv 2511.11683, tail merging). Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from stratavit.elastic.site import Site
from stratavit.elastic.token_places import SiteOrPlace
from stratavit.errors import ArtifactError, described
from stratavit.spec import Spec


@dataclass(frozen=True)
class Entry:
    """One unit is dropped.

    Attributes:
        site: Its module.
        width: Width of the module afterwards.
        group: Units with the same number were merged: the paper drops them together.
    """

    site: str
    width: int
    group: int


class Strata:
    """An ordered dropout list. Position p means that the first p entries are dropped; 0 is the full model.

    Args:
        sites: The sites of the model, and where it merges tokens.
        entries: In order of removal; each drops one or more units off its site's tail.

    Raises:
        ArtifactError: An entry does not fit the sites, does not shrink its site, or goes below its floor.
    """

    def __init__(self, sites: Sequence[SiteOrPlace], entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._full = {site.name: site.width for site in sites}
        steps = {site.name: [step for step in site.steps if step >= site.floor] for site in sites}
        widths = dict(self._full)
        for number, entry in enumerate(self.entries):
            if entry.site not in widths:
                raise ArtifactError(
                    f"dropout list: entry {number} names {described(entry.site)}, which the model does not have"
                )
            if entry.width not in steps[entry.site] or entry.width >= widths[entry.site]:
                raise ArtifactError(
                    f"dropout list: entry {number} sets {entry.site} to width {described(entry.width)}, "
                    f"expected a unit's end below {widths[entry.site]} that keeps what must be kept"
                )
            widths[entry.site] = entry.width

    def __len__(self) -> int:
        return len(self.entries)

    def spec(self, position: int) -> Spec:
        """Widths of every site after the first `position` entries."""
        assert 0 <= position <= len(self.entries)
        return Spec(self._full | {entry.site: entry.width for entry in self.entries[:position]})

    def smallest(self) -> Spec:
        """Widths of every site once all entries are dropped."""
        return self.spec(len(self))

    def group_ends(self) -> list[int]:
        """Positions at which no merged tail is cut in two: where ``method="paper"`` may stop."""
        inner = [p for p, (a, b) in enumerate(pairwise(self.entries), 1) if a.group != b.group]
        return sorted({0, *inner, len(self)})

    def to_json(self) -> list[list[Any]]:
        """Rows ``[site, width, group]``."""
        return [list(astuple(entry)) for entry in self.entries]

    @classmethod
    def from_json(cls, sites: Sequence[SiteOrPlace], rows: Any) -> Strata:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: The rows are not of that form or do not fit the sites.
        """
        for number, row in enumerate(rows if isinstance(rows, list) else [None]):
            if not isinstance(row, list) or [type(cell) for cell in row] != [str, int, int]:
                raise ArtifactError(f"dropout list: entry {number} must be [site, width, group], got {described(row)}")
        return cls(sites, [Entry(*row) for row in rows])


def tail_candidates(importance: Sequence[float], macs: Sequence[float]) -> list[tuple[int, float]]:
    """Tails of one module that may be dropped, as (first unit, density), largest tail first.

    From the head of the module on, a tail is a candidate only if its density (importance of the tail / its MACs) does
    not exceed that of the last candidate, so densities fall towards the end, and units between two candidates drop
    together.
    """
    candidates: list[tuple[int, float]] = []
    for first in range(len(importance)):
        density = sum(importance[first:]) / sum(macs[first:])
        if not candidates or density <= candidates[-1][1]:
            candidates.append((first, density))
    return candidates


def removal_order(
    sites: Sequence[Site],
    importance: Mapping[str, Sequence[float]],
    price: Callable[[Site, int], float],
    first_group: int = 0,
) -> list[Entry]:
    """The units that are left, least important first.

    No unit below a site's floor is listed. All tail candidates of all modules are sorted by density; each adds its
    units that are not yet listed, as consecutive entries, last unit first, sharing a group number.

    Args:
        sites: The sites of the model.
        importance: Site name -> importance of each unit that is left (`sensitivity.unit_importance`).
        price: Cost of a site at a width (`CostModel.price`).
        first_group: Number of the first group.

    Returns:
        The entries.
    """
    by_name = {site.name: site for site in sites}
    candidates = []
    for name, values in importance.items():
        prices = [price(by_name[name], step) for step in by_name[name].steps[: len(values) + 1]]
        costs = [b - a for a, b in pairwise(prices)]
        kept = by_name[name].steps.index(by_name[name].least)  # units that are never dropped
        tails = tail_candidates(values[kept:], costs[kept:])
        candidates += [(density, -first - kept, name) for first, density in tails]
    left = {name: len(values) for name, values in importance.items()}
    entries: list[Entry] = []
    for group, (_, negative_first, name) in enumerate(sorted(candidates), first_group):
        units = range(-negative_first, left[name])
        entries += [Entry(name, by_name[name].steps[unit], group) for unit in reversed(units)]
        left[name] = min(left[name], -negative_first)
    return entries
