"""Finds where along the dropout list all budgets hold, by bisection: costs fall along it, accuracy nearly so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stratavit.budgets.amounts import COUNTS, GOALS, Amount, Bound, Budget, amount_text, parse
from stratavit.budgets.latency_curve import LatencyCurve
from stratavit.errors import BudgetError
from stratavit.evaluation import turns
from stratavit.spec import Spec
from stratavit.utils.progress import begin_part, overall


@dataclass
class Limit:
    """One budget to keep.

    Attributes:
        kind: See `Bound`.
        written: The amount as the user wrote it.
        measure: Value of the sub-network at a position of the list.
        ends: First and last position that may be chosen.
        timing: For a latency, what times it and knows how certain it is; its values are those of `measure`.
        size: Share of the dense model's MACs at a position, which the work of an accuracy follows.
        known: Position -> value, as far as measured.
        asked: The amount in absolute units, once `open` has read it.
    """

    kind: str
    written: Amount
    measure: Callable[[int], float]
    ends: tuple[int, int]
    timing: LatencyCurve | None = None
    size: Callable[[int], float] = lambda position: 1.0
    known: dict[int, float] = field(default_factory=dict)
    asked: float = 0.0

    @property
    def is_goal(self) -> bool:
        """An accuracy; else a cost."""
        return self.kind in GOALS

    def value(self, position: int, left: float | None = None) -> float:
        """At a position; measured once. `left` is the work that follows, see `begin_part`."""
        if position not in self.known:
            if self.is_goal:
                begin_part(self.size(position), left)
            self.known[position] = self.measure(position)
        return self.known[position]

    def holds(self, position: int, left: float | None = None) -> bool:
        """Whether the sub-network at a position keeps the budget."""
        value = self.value(position, left)
        return value >= self.asked if self.kind == "top1" else value <= self.asked

    def open(self) -> None:
        """Reads the amount, and sees whether it can be met at all.

        A count above the dense model's is refused: who asks for it may have meant something else.
        """
        dense, end = self.ends[0], self.ends[0 if self.is_goal else 1]
        if self.timing is not None:
            self.asked = self.timing.aim(lambda whole: parse(self.kind, self.written, whole))
        else:
            self.asked = parse(self.kind, self.written, self.value(dense))
        if not self.holds(end) or (self.kind in COUNTS and self.asked > self.value(dense)):
            raise self.unreachable()

    def unreachable(self) -> BudgetError:
        """The error where nothing on the list keeps this budget."""
        low, high = sorted(self.value(end) for end in self.ends)
        shares = "" if self.is_goal else f" ({low / high:.1%} to 100%)"
        asked, *reachable = (amount_text(self.kind, amount) for amount in (self.asked, low, high))
        return BudgetError(
            f"{self.kind}: asked {self.written!r} = {asked}, but the reachable range is {' to '.join(reachable)}"
            f"{shares}{self._hint()}"
        )

    def _hint(self) -> str:
        """What may have been meant, or what may have gone wrong."""
        if self.kind in COUNTS and self.written in (1, "1"):
            return "; a share is written 1.0 or 100%"
        percent = self.asked if self.kind in COUNTS else 100 * self.asked
        if not self.is_goal and 1 <= percent <= 100:
            return f"; did you mean {percent:g}%?"
        note = "" if self.timing is None else turns.noise_note(turns.unrest(self.timing.dense))
        return f"; {note}" if note else ""

    def bound(self, position: int) -> Bound:
        """What was asked for and got."""
        low, high = sorted(self.value(end) for end in self.ends)
        spread = 0.0 if self.timing is None else self.timing.spread(position)
        return Bound(self.kind, self.asked, self.value(position), low, high, spread)


def meet(limits: Sequence[Limit], spec_at: Callable[[int], Spec], positions: Sequence[int]) -> Budget:
    """The sub-network of the list that keeps all budgets: the largest; the smallest if an accuracy is asked for.

    Costs are taken to fall along the list. Accuracy nearly does; where it does not, the sub-network found keeps the
    bound and the next smaller one on the list does not, though a still smaller one might.

    Raises:
        BudgetError: A budget cannot be read or is outside the reachable range, or they exclude each other.
    """
    costs = sorted((limit for limit in limits if not limit.is_goal), key=lambda limit: limit.timing is not None)
    goals = [limit for limit in limits if limit.is_goal]
    index = 0
    for limit in costs:
        limit.open()
        if not limit.holds(positions[index]):
            index = _bisected(limit, positions, len(positions) - 1, index)
    if goals:
        with overall(f"find {' and '.join(limit.kind for limit in goals)}", _work(goals[0], positions, index)):
            index = _smallest(goals, costs, positions, index)
            for limit in goals:
                limit.bound(positions[index])  # measures the ends of the range
    position = positions[index]
    return Budget(tuple(limit.bound(position) for limit in limits), position, spec_at(position))


def _work(goal: Limit, positions: Sequence[int], index: int) -> float:
    """Of finding the smallest sub-network from an index on: both ends, where the search begins, and its steps."""
    middle = positions[(index + len(positions)) // 2]
    ends = sum(goal.size(position) for position in {*goal.ends, positions[index]})
    return ends + (len(positions) - index).bit_length() * goal.size(middle)


def _smallest(goals: Sequence[Limit], costs: Sequence[Limit], positions: Sequence[int], index: int) -> int:
    """The last index from `index` on at which all accuracies hold."""
    for limit in goals:
        limit.open()
        if not limit.holds(positions[index]):
            raise _conflict(limit, costs, positions[index])
    return min(_bisected(limit, positions, index, len(positions)) for limit in goals)


def _conflict(limit: Limit, others: Sequence[Limit], position: int) -> BudgetError:
    size, got = "smallest" if others[0].is_goal else "largest", amount_text(limit.kind, limit.value(position))
    return BudgetError(
        f"{limit.kind}: asked {limit.written!r}, but the {size} sub-network within "
        f"{' and '.join(other.kind for other in others)} has {got}; ask for less, or allow it more"
    )


def _bisected(limit: Limit, positions: Sequence[int], holds: int, fails: int) -> int:
    """An index that holds while its neighbour does not, between an index that holds and one that does not."""
    for left in reversed(range(abs(holds - fails).bit_length())):
        middle = (holds + fails) // 2
        if middle in (holds, fails):
            break
        place = positions[middle]
        good = limit.holds(place, left * limit.size(place) + limit.size(limit.ends[1]))
        holds, fails = (middle, fails) if good else (holds, middle)
    return holds
