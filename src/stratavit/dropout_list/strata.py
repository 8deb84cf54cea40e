"""The dropout list: every unit of every site, in order of removal. A prefix of it is a `Spec`.

Source: method section 2 (arXiv 2511.11683, unit importance and tail merging). Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stratavit.elastic.site import Site
from stratavit.errors import ArtifactError, described
from stratavit.spec import Spec


@dataclass(frozen=True)
class Entry:
    """One unit leaves.

    Attributes:
        site: The module it leaves.
        width: Width of the module afterwards.
        group: Units with the same number were merged: the paper drops them together.
    """

    site: str
    width: int
    group: int


class Strata:
    """An ordered dropout list. Position p means that the first p entries are dropped; 0 is the full model.

    Args:
        sites: The sites of the model.
        entries: In order of removal; each takes one or more whole units off its site's tail.

    Raises:
        ArtifactError: An entry does not fit the sites, or does not shrink its site.
    """

    def __init__(self, sites: Sequence[Site], entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._full = {site.name: site.width for site in sites}
        steps = {site.name: site.steps for site in sites}
        widths = dict(self._full)
        for number, entry in enumerate(self.entries):
            if entry.site not in widths:
                raise ArtifactError(
                    f"dropout list: entry {number} names {described(entry.site)}, which the model does not have"
                )
            if not 0 <= entry.width < widths[entry.site] or entry.width not in steps[entry.site]:
                raise ArtifactError(
                    f"dropout list: entry {number} sets {entry.site} to width {described(entry.width)}, "
                    f"expected a unit's end below {widths[entry.site]}"
                )
            widths[entry.site] = entry.width

    def __len__(self) -> int:
        return len(self.entries)

    def spec(self, position: int) -> Spec:
        """Widths of every site after the first `position` entries."""
        assert 0 <= position <= len(self.entries)
        widths = dict(self._full)
        for entry in self.entries[:position]:
            widths[entry.site] = entry.width
        return Spec(widths)

    def smallest(self) -> Spec:
        """Widths of every site once all entries have left."""
        return self.spec(len(self))

    def group_ends(self) -> list[int]:
        """Positions at which no merged tail is cut in two: where ``method="paper"`` may stop."""
        groups = [entry.group for entry in self.entries]
        inner = [p for p in range(1, len(groups)) if groups[p - 1] != groups[p]]
        return sorted({0, *inner, len(groups)})

    def to_json(self) -> list[list[Any]]:
        """Rows ``[site, width, group]``."""
        return [[entry.site, entry.width, entry.group] for entry in self.entries]

    @classmethod
    def from_json(cls, sites: Sequence[Site], rows: Any) -> Strata:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: The rows are not of that form or do not fit the sites.
        """
        entries = []
        for number, row in enumerate(rows if isinstance(rows, list) else [None]):
            types = [type(cell) for cell in row] if isinstance(row, list) else []
            if types != [str, int, int]:
                raise ArtifactError(f"dropout list: entry {number} must be [site, width, group], got {described(row)}")
            entries.append(Entry(*row))
        return cls(sites, entries)


def unit_importance(site: Site, alpha: Sequence[float], gamma: float) -> list[float]:
    """Importance of each unit, ``gamma * sum of alpha over the unit``, alpha normalised to sum 1 (paper, I_u).

    The division by MACs happens where densities are compared (`tail_candidates`).

    Args:
        site: The site.
        alpha: Importance of each coordinate, ``[w]``, w a unit's end.
        gamma: Sensitivity of the module.
    """
    total = sum(alpha) or 1.0
    ends = [step for step in site.steps if step <= len(alpha)]
    return [gamma * sum(alpha[a:b]) / total for a, b in pairwise(ends)]


def tail_candidates(importance: Sequence[float], macs: Sequence[float]) -> list[tuple[int, float]]:
    """Tails of one module that may be dropped, as (first unit, density), largest tail first.

    Walking from the head of the module, a tail is a candidate only if its density (importance of the
    whole tail / its MACs) does not exceed that of the last candidate, so densities fall towards the end
    and units between two candidates drop together.
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

    All tail candidates of all modules are sorted by density; each adds the units not yet listed, as
    consecutive entries, last unit first, sharing a group number.

    Args:
        sites: The sites of the model.
        importance: Site name -> importance of each unit that is left (`unit_importance`).
        price: Cost of a site at a width (`CostModel.price`).
        first_group: Number of the first group.
    """
    by_name = {site.name: site for site in sites}
    candidates = []
    for name, values in importance.items():
        steps = by_name[name].steps
        costs = [price(by_name[name], b) - price(by_name[name], a) for a, b in pairwise(steps)][: len(values)]
        candidates += [(density, -first, name) for first, density in tail_candidates(values, costs)]
    left = {name: len(values) for name, values in importance.items()}
    entries: list[Entry] = []
    for number, (_, negative_first, name) in enumerate(sorted(candidates)):
        for unit in range(left[name] - 1, -negative_first - 1, -1):
            entries.append(Entry(name, by_name[name].steps[unit], first_group + number))
        left[name] = min(left[name], -negative_first)
    return entries
