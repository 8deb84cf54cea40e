"""The dropout list over both axes: units of tokens next to units of width.

At each of a few sizes, numbers of tokens and the position on the width list are chosen together, by the distance to
the dense model measured on calibration images: tokens are merged as long as that costs less accuracy than removing the
same MACs by width. Between two of these sizes, units of tokens and of the width list leave in turns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.data.feed import Feed
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


@dataclass(frozen=True)
class TokenSearch:
    """How the list over both axes is measured.

    Attributes:
        shares: Of the dense model's MACs, largest first: sizes at which tokens are weighed against width.
        images: Of each measurement.
        places: Number of blocks that merge tokens, of a model of twelve blocks; others in proportion.
    """

    shares: tuple[float, ...] = (5 / 6, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
    images: int = 100
    places: int = 5


def token_search(
    axes: Sequence[str], method: str, model: nn.Module, places: Sequence[TokenPlace]
) -> TokenSearch | None:
    """How the list over the named axes is measured; None for widths alone.

    Raises:
        StrataViTError: Unknown axes, or a model or method that cannot merge tokens.
    """
    named = sorted(map(str, axes)) if isinstance(axes, list | tuple) else None
    if named == ["width"]:
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
    return TokenSearch()


def chosen_places(places: Sequence[TokenPlace], count: int) -> list[TokenPlace]:
    """Blocks spread over the depth, the second one first: measured, few places are better than every block."""
    number = max(1, round(count * len(places) / 12))
    stride = max(1, len(places) // number) if number > 1 else len(places)
    return list(places[1 if len(places) > 1 else 0 :: stride][:number])


class Search:
    """Finds numbers of tokens at one size after the other.

    Args:
        cost: Of the model.
        places: Those that may merge.
        widths: The width list.
        distance: Of the network at a spec to the dense model, on the calibration images.
    """

    def __init__(
        self,
        cost: CostModel,
        places: Sequence[TokenPlace],
        widths: Strata,
        distance: Callable[[Mapping[str, int]], float],
    ) -> None:
        self.cost, self.places, self.widths, self.distance = cost, places, widths, distance
        self.position = 0
        self.counts = tuple(place.width for place in places)
        self.known: dict[tuple[int, ...], tuple[float, int]] = {}

    def reaches(self, share: float) -> bool:
        """Whether the width list alone goes down to a share of the MACs."""
        return self.cost.macs(self.widths.smallest()) <= share * self.cost.macs()

    def spec(self, counts: Sequence[int], position: int) -> dict[str, int]:
        """Widths and tokens together."""
        tokens = {place.name: count for place, count in zip(self.places, counts, strict=True)}
        return {**self.widths.spec(position), **tokens}

    def measured(self, counts: tuple[int, ...], budget: float) -> tuple[float, int]:
        """Distance at these tokens with as much width as the budget allows, and the position that this is."""
        if counts not in self.known:
            fits = range(self.position, len(self.widths) + 1)
            index = bisect_left(fits, True, key=lambda p: self.cost.macs(self.spec(counts, p)) <= budget)
            if index == len(fits):
                self.known[counts] = float("inf"), len(self.widths)
            else:
                self.known[counts] = self.distance(self.spec(counts, fits[index])), fits[index]
        return self.known[counts]

    def at(self, share: float) -> dict[str, int]:
        """The best spec of a share of the MACs, inside the one that was found before."""
        budget = share * self.cost.macs()
        caps = self.counts
        self.known = {}
        best = self.counts
        for stride in STRIDES:
            moving = True
            while moving:
                moving = False
                for new in self.moves(best, caps, stride):
                    if self.measured(new, budget)[0] < self.measured(best, budget)[0]:
                        best, moving = new, True
        self.counts, self.position = best, self.measured(best, budget)[1]
        return self.spec(best, self.position)

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
        before = self.places[0].width
        for count, cap, place in zip(counts, caps, self.places, strict=True):
            now = min(count, cap, before)
            if now < max(least(before), place.steps[0]):
                return None
            before = now
            found.append(now)
        return tuple(found)


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
    free = [place for place in cost.places if not place.floor]
    places, known = chosen_places(free, tokens.places), DenseOutputs() if known is None else known
    with eval_mode(model), frozen(model), crossed(model, 0):
        reference = Reference(model, sites, Feed(loader, model).take(tokens.images, 0), known)

        def distance(spec: Mapping[str, int]) -> float:
            with running(Run(tokens=token_counts(model, cost.places, spec))):
                return reference.distance(spec)

        search = Search(cost, places, Strata(sites, widths), distance)
        reachable = [share for share in tokens.shares if search.reaches(share)]
        states: list[tuple[int, tuple[int, ...]]] = []
        for share in track(reachable, "weigh tokens against width"):
            search.at(share)
            states.append((search.position, search.counts))
    facts = {
        "tokens": asdict(tokens),
        "places": [place.name for place in places],
        "states": [[share, *state] for share, state in zip(reachable, states, strict=True)],
    }
    return reachable_merges(interleaved(widths, places, states), cost.places), facts


def interleaved(
    widths: Sequence[Entry], places: Sequence[TokenPlace], states: Sequence[tuple[int, Sequence[int]]]
) -> list[Entry]:
    """The list through states: between two of them every unit leaves at its share of the way.

    Args:
        widths: The width list; what no state has dropped comes last.
        places: That merge tokens.
        states: Position on the width list and tokens at every place, nested, largest first.
    """
    entries: list[Entry] = []
    position, counts = 0, [place.width for place in places]
    for after, wanted in states:
        cut = widths[position:after]
        leaving = [((number + 1) / len(cut), 1, entry) for number, entry in enumerate(cut)]
        for place, before, count in zip(places, counts, wanted, strict=True):
            ends = [step for step in reversed(place.steps) if count <= step < before]
            leaving += [((i + 1) / len(ends), 0, Entry(place.name, end, 0)) for i, end in enumerate(ends)]
        entries += [entry for _, _, entry in sorted(leaving, key=lambda one: one[:2])]
        position, counts = after, list(wanted)
    return [*entries, *widths[position:]]


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
