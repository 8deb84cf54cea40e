"""What a dropout list must keep: modules that it never cuts, and the least width of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from stratavit.elastic.site import Site
from stratavit.elastic.token_places import SiteOrPlace
from stratavit.errors import StrataViTError, described
from stratavit.models.cost import CostModel

Floor = int | float  # channels, or a share of the full width
MinWidth = Floor | Mapping[str, Floor]


def with_floors(cost: CostModel, ignore: Sequence[str] | None = None, min_width: MinWidth | None = None) -> CostModel:
    """The cost model with the floors that were asked for on its sites and places, in place of those that they had.

    Args:
        cost: Of the model. A pattern may also name a module that cannot be cut.
        ignore: Patterns (`fnmatch`) of names; these sites stay at full width, these blocks merge no tokens.
        min_width: Least width of every site, or by pattern of names: channels (int) or a share of the full width
            (float). The largest counts where several patterns fit. With `ignore` also None, floors stay as they were.

    Returns:
        The same sites and places with other floors.

    Raises:
        StrataViTError: A pattern fits nothing, a width is out of range, or nothing is left to cut.
    """
    if ignore is None and min_width is None:
        return cost
    by_pattern = min_width if isinstance(min_width, Mapping) else {"*": min_width or 0}
    floors = {site.name: 0 for site in cost.sites}
    known, places = [*floors, *cost.uncut], [place.name for place in cost.places]
    for pattern, amount in by_pattern.items():
        matched = _matched("min_width", pattern, known, places)
        floors |= {s.name: max(floors[s.name], _channels(s, amount)) for s in cost.sites if s.name in matched}
    ignored: set[str] = set()
    for pattern in [ignore] if isinstance(ignore, str) else ignore or ():
        ignored |= _matched("ignore", pattern, [*known, *places])
    kept = tuple(replace(s, floor=s.width if s.name in ignored else floors[s.name]) for s in cost.sites)
    if all(site.least == site.width for site in kept):
        raise StrataViTError("ignore and min_width keep every site at its full width; nothing is left to cut")
    merging = tuple(replace(place, floor=place.width if place.name in ignored else 0) for place in cost.places)
    return replace(cost, sites=kept, places=merging)


def floors_of(sites: Iterable[SiteOrPlace]) -> dict[str, int]:
    """Name -> floor of the sites and places that have one."""
    return {site.name: site.floor for site in sites if site.floor}


def _matched(option: str, pattern: object, names: Sequence[str], places: Sequence[str] = ()) -> set[str]:
    """The names that a pattern fits; an error with the nearest ones if it fits none."""
    if not isinstance(pattern, str):
        raise StrataViTError(f"{option}: expected patterns of names such as 'blocks.0.*', got {described(pattern)}")
    found = {name for name in names if fnmatchcase(name, pattern)}
    if found:
        return found
    if any(fnmatchcase(name, pattern) for name in places):
        raise StrataViTError(f"{option}: {pattern!r} names numbers of tokens, which have no least width; ignore them")
    inside = f"{pattern}.*"
    if any(fnmatchcase(name, inside) for name in names):
        raise StrataViTError(f"{option}: {pattern!r} is not a site, but contains some; did you mean {inside!r}?")
    near = get_close_matches(pattern, sorted(names), n=3, cutoff=0.4) or sorted(names)[:3]
    raise StrataViTError(
        f"{option}: no site fits {pattern!r}; the nearest are {', '.join(near)}. Only attention and MLP modules are cut"
    )


def _channels(site: Site, amount: object) -> int:
    """Channels that a floor asks of a site."""
    if isinstance(amount, float) and 0 < amount <= 1:
        return math.ceil(amount * site.width - 1e-9)
    if type(amount) is not int or amount < 0:
        raise StrataViTError(
            f"min_width: expected channels (a whole number) or a share above 0 and at most 1.0, got {described(amount)}"
        )
    if amount > site.width:
        raise StrataViTError(
            f"min_width: {amount} is more than the full width of {site.name}, {site.width}; give a share, or widths by "
            "pattern of names"
        )
    return amount
