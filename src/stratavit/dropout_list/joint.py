"""The dropout list over both axes: units of tokens next to units of width.

At each of a few sizes, numbers of tokens and widths are chosen together, by the distance to the dense model measured on
calibration images: tokens are merged as long as that costs less accuracy than removing the same MACs by width. Widths
follow the width list, but a channel of a block with few tokens costs few MACs, so that it stays longer. Between two of
these sizes, units of tokens and of width leave in turns. Patches that nobody reads behind the last block leave first.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.data.feed import Feed
from stratavit.dropout_list.allocation import State, allocate, ordered_list
from stratavit.dropout_list.marginal_effects import Reference, crossed
from stratavit.dropout_list.strata import Entry, Strata
from stratavit.elastic.merging import least
from stratavit.elastic.running import Run, running
from stratavit.elastic.site import Site
from stratavit.elastic.token_places import TokenPlace, can_merge
from stratavit.elastic.tokens import token_counts
from stratavit.errors import StrataViTError, described
from stratavit.models.cost import CostModel
from stratavit.models.families import merging
from stratavit.spec import TOKENS
from stratavit.utils.model import eval_mode, frozen
from stratavit.utils.progress import track

STRIDES = (32, 16, 8)  # tokens that a move of the search takes from a place or gives to it
DOUBT = 1.03  # a move that is worse by no more than this on a few images is measured on more of them


@dataclass(frozen=True)
class TokenSearch:
    """How the list over both axes is measured.

    Attributes:
        shares: Of the dense model's MACs, largest first: sizes at which tokens are weighed against width.
        images: Of each measurement.
        confirming: Images on which a move must be better, too, before it is made.
        places: Number of blocks that merge tokens; None: see `default_number`.
        cheapness: Power of the price of a channel that its keep ratio follows: 0 is the width list as it is.
    """

    shares: tuple[float, ...] = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
    images: int = 60
    confirming: int = 300
    places: int | None = None
    cheapness: float = 0.4


def token_search(
    axes: Sequence[str], method: str, model: nn.Module, places: Sequence[TokenPlace], number: int | None = None
) -> TokenSearch | None:
    """How the list over the named axes is measured, with so many places that merge; None for widths alone.

    Raises:
        StrataViTError: Unknown axes, a model or method that cannot merge tokens, or a number that cannot be.
    """
    named = sorted(map(str, axes)) if isinstance(axes, list | tuple) else None
    if named == ["width"]:
        check_asked_for(number, merges=False)
        return None
    if named != ["tokens", "width"]:
        raise StrataViTError(f"axes: expected ('width',) or ('width', 'tokens'), got {described(axes)}")
    if method != "default":
        raise StrataViTError(f"axes: method {method!r} has no list that merges tokens; leave 'tokens' out")
    if not places:
        reason = merging(model)
        why = reason if isinstance(reason, str) else "classes of transformers have no such block, use the timm model"
        raise StrataViTError(f"axes: this model cannot merge tokens: {why}; leave 'tokens' out")
    if all(place.floor for place in places):
        raise StrataViTError("axes: every place that merges tokens is ignored; leave 'tokens' out, or ignore fewer")
    free = sum(place.may_merge for place in places)
    if number is not None and not free:
        raise StrataViTError("merging_places: no block may merge tokens; leave it out, or ignore fewer")
    if number is not None and (type(number) is not int or not 1 <= number <= free):
        raise StrataViTError(f"merging_places: expected a number of blocks from 1 to {free}, got {described(number)}")
    return TokenSearch(places=number)


def check_asked_for(number: int | None, merges: bool) -> None:
    """Refuses a number of merging places where no list merges tokens."""
    if number is not None and not merges:
        raise StrataViTError(
            "merging_places: no list merges tokens; add 'tokens' to axes (--axes both), or leave it out"
        )


def default_number(places: Sequence[TokenPlace]) -> int:
    """Five of twelve places, others in proportion: measured, few are better than every block."""
    return max(1, round(5 * len(places) / 12))


def chosen_places(places: Sequence[TokenPlace], number: int | None = None) -> list[TokenPlace]:
    """So many blocks spread over the depth, the second one first if not all are taken."""
    number = min(len(places), default_number(places) if number is None else number)
    first = int(number < len(places))
    return [places[first + index * (len(places) - first) // number] for index in range(number)]


class Search:
    """Finds numbers of tokens and widths at one size after the other.

    Args:
        cost: Of the model.
        places: Those that may merge.
        widths: The width list.
        distance: Of the network at a spec to the dense model, on a few calibration images.
        confirm: The same on more images; None: those few are enough.
        cheapness: See `TokenSearch`.
    """

    def __init__(
        self,
        cost: CostModel,
        places: Sequence[TokenPlace],
        widths: Strata,
        distance: Callable[[Mapping[str, int]], float],
        confirm: Callable[[Mapping[str, int]], float] | None = None,
        cheapness: float = 0.4,
    ) -> None:
        self.cost, self.places, self.widths, self.cheapness = cost, places, widths, cheapness
        self.distance, self.confirm = distance, confirm
        self.counts = tuple(place.width for place in places)
        self.caps = {site.name: site.width for site in cost.sites}
        self.unread = {place.name: 0 for place in cost.places if place.unread and not place.floor}

    def reaches(self, share: float) -> bool:
        """Whether the narrowest widths and the fewest tokens go down to a share of the MACs."""
        tokens = {place.name: count for place, count in zip(self.places, self.fewest(), strict=True)}
        narrowest = {site.name: site.last_unit for site in self.cost.sites}
        return self.cost.macs({**narrowest, **tokens, **self.unread}) <= _whole_macs(share, self.cost)

    def fewest(self) -> tuple[int, ...]:
        """Numbers of tokens if every place merges as many at once as it can."""
        found: list[int] = []
        before = self.places[0].width if self.places else 0
        for place in self.places:
            before = place.at_least(least(before))
            found.append(before)
        return tuple(found)

    def fitting(self, budget: float, distance: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
        """Where the search begins: the counts before, or where no width suffices for those, fewer tokens.

        From each place on, as few are merged as fit the budget; the best of these by `distance`.
        """
        if self.spec(self.counts, budget) is not None:
            return self.counts
        found, fewest = [], self.fewest()
        for first in range(len(self.places)):
            for count in reversed(self.places[0].steps):
                asked = [max(count, low) if i >= first else self.counts[i] for i, low in enumerate(fewest)]
                new = self.capped(asked, self.counts)
                if new is not None and self.spec(new, budget) is not None:
                    found.append(new)
                    break
        return min(found, key=distance)

    def spec(self, counts: Sequence[int], budget: float) -> dict[str, int] | None:
        """Tokens, with as much width as the budget allows inside the size before; None if it allows none.

        The width list says how much of its width each module keeps. Where tokens were merged, its channels cost fewer
        MACs, and it keeps more: its keep ratio is divided by a power of that share.
        """
        tokens = {place.name: count for place, count in zip(self.places, counts, strict=True)} | self.unread
        here = self.cost.at_tokens(tokens)
        fits = range(len(self.widths) + 1)
        index = bisect_left(fits, True, key=lambda p: here.macs(self.widths.spec(p)) <= budget)
        listed, ratios = self.widths.spec(min(index, len(self.widths))), {}
        for site in here.sites:
            cheaper = math.log(self.cost.each(site) / here.each(site))
            kept = max(listed[site.name], site.last_unit) / site.width
            ratios[site.name] = math.log(kept) + self.cheapness * cheaper
        widths = allocate(here, ratios, budget / here.macs(), self.caps)
        return {**widths, **tokens} if here.macs(widths) <= budget else None

    def at(self, share: float) -> dict[str, int]:
        """The best spec of a share of the MACs, inside the one that was found before."""
        budget, caps = _whole_macs(share, self.cost), self.counts
        few = self.measurement(self.distance, budget)
        many = few if self.confirm is None else self.measurement(self.confirm, budget)
        best = self.fitting(budget, few)
        for stride in STRIDES:
            moving = True
            while moving:
                moving = False
                for new in self.moves(best, caps, stride):
                    if few(new) < DOUBT * few(best) and many(new) < many(best):
                        best, moving = new, True
        found = self.spec(best, budget)
        assert found is not None, "only shares that can be reached are asked for"
        self.counts, self.caps = best, {site.name: found[site.name] for site in self.cost.sites}
        return found

    def measurement(
        self, distance: Callable[[Mapping[str, int]], float], budget: float
    ) -> Callable[[tuple[int, ...]], float]:
        """Numbers of tokens -> distance with as much width as the budget allows, each measured once."""

        @cache
        def measured(counts: tuple[int, ...]) -> float:
            spec = self.spec(counts, budget)
            return math.inf if spec is None else distance(spec)

        return measured

    def moves(self, counts: tuple[int, ...], caps: tuple[int, ...], stride: int) -> list[tuple[int, ...]]:
        """Tokens taken at a place or given back there, for all places behind it or for itself alone."""
        found = []
        for index in range(len(counts)):
            for step in (-stride, stride):
                behind = tuple(c + step if i >= index else c for i, c in enumerate(counts))
                alone = tuple(c + step if i == index else c for i, c in enumerate(counts))
                found += [self.capped(new, caps) for new in (behind, alone)]
        return [new for new in dict.fromkeys(found) if new is not None and new != counts]

    def capped(self, counts: Sequence[int], caps: Sequence[int]) -> tuple[int, ...] | None:
        """Counts brought inside the caps, falling along the depth; None if a place cannot merge so many at once."""
        found: list[int] = []
        before = self.places[0].width if self.places else 0
        for count, cap, place in zip(counts, caps, self.places, strict=True):
            now = min(count, cap, before)
            if now < max(least(before), place.steps[0]):
                return None
            before = now
            found.append(now)
        return tuple(found)


def _whole_macs(share: float, cost: CostModel) -> int:
    """A share of the dense MACs as a whole number, which no rounding can pass."""
    return math.floor(share * cost.macs() + 1e-6)


def joint_list(
    model: nn.Module,
    sites: Sequence[Site],
    cost: CostModel,
    loader: Iterable[Any],
    widths: Sequence[Entry],
    tokens: TokenSearch,
    known: DenseOutputs | None = None,
) -> tuple[list[Entry], dict[str, Any]]:
    """The dropout list over both axes.

    Args:
        model, sites, cost: The sites are elastic modules, calibrated; blocks merge tokens at the places of `cost`.
        loader: The calibration images; labels are not used.
        widths: The width list.
        tokens: How numbers of tokens are chosen.
        known: Of the dense model's outputs, what is known.

    Returns:
        The entries, and facts for the provenance.

    Raises:
        StrataViTError: Bad images, or a cut network whose output is not finite.
    """
    free = [place for place in cost.places if place.may_merge]
    places, known = chosen_places(free, tokens.places), DenseOutputs() if known is None else known
    with eval_mode(model), frozen(model), crossed(model, 0):
        feed = Feed(loader, model)

        def distance_on(images: int) -> Callable[[Mapping[str, int]], float]:
            reference = Reference(model, sites, feed.take(images, 0), known)

            def distance(spec: Mapping[str, int]) -> float:
                with running(Run(tokens=token_counts(model, cost.places, spec))):
                    return reference.distance(spec)

            return distance

        few, many = distance_on(tokens.images), distance_on(tokens.confirming)
        search = Search(cost, places, Strata(sites, widths), few, many, tokens.cheapness)
        reachable = [share for share in tokens.shares if search.reaches(share)]
        states = [State(share, search.at(share)) for share in track(reachable, "weigh tokens against width")]
    facts = {
        "tokens": asdict(tokens),
        "places": [place.name for place in places],
        "states": [[state.share, dict(state.widths)] for state in states],
    }
    last = {entry.site: float(number) for number, entry in enumerate(widths) if entry.width == 0}
    unread = [Entry(name, 0, 0) for name in search.unread]  # costs nothing, so it goes first
    return reachable_merges([*unread, *ordered_list(sites, states, last, places)], cost.places), facts


def reachable_merges(entries: Sequence[Entry], places: Sequence[TokenPlace]) -> list[Entry]:
    """The entries in an order in which no place has to merge more at once than it can: those wait."""
    tokens: dict[str, int] = {}
    done: list[Entry] = []
    waiting: list[Entry] = []
    for entry in entries:
        waiting.append(entry)
        while (ready := next((one for one in waiting if _is_ready(one, places, tokens)), None)) is not None:
            waiting.remove(ready)
            done.append(ready)
            tokens[ready.site] = ready.width
    return [replace(entry, group=group) for group, entry in enumerate(done)]


def _is_ready(entry: Entry, places: Sequence[TokenPlace], tokens: Mapping[str, int]) -> bool:
    return not entry.site.endswith(TOKENS) or can_merge(places, {**tokens, entry.site: entry.width})
