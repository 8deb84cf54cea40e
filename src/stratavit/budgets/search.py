"""Where along the dropout list all budgets hold, by bisection: costs fall along it, and so, nearly, does accuracy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stratavit.budgets.amounts import Bound, Budget, amount_text
from stratavit.errors import BudgetError
from stratavit.spec import Spec
from stratavit.utils.progress import track


@dataclass
class Limit:
    """One budget to keep.

    Attributes:
        kind: See `Bound`.
        read: The absolute amount asked for, given the dense model's.
        measure: Value of the sub-network at a position of the list.
        at_most: The value must not exceed the amount; else it must reach it.
        written: The amount as the user wrote it.
        exact: The value is computed, not timed; a timed one is taken anew before it is trusted.
        closed: An amount above the dense model's cost is refused: who asks for it may have meant something else.
        is_goal: An accuracy, which falls along the list; else a cost.
    """

    kind: str
    read: Callable[[float], float]
    measure: Callable[[int], float]
    at_most: bool
    written: object
    exact: bool = True
    closed: bool = False
    is_goal: bool = False
    known: dict[int, float] = field(default_factory=dict)
    asked: float = 0.0

    def value(self, position: int, anew: bool = False) -> float:
        """At a position; measured once, unless asked to do so anew."""
        if anew or position not in self.known:
            self.known[position] = self.measure(position)
        return self.known[position]

    def holds(self, position: int) -> bool:
        """Whether the sub-network at a position keeps the budget."""
        value = self.value(position)
        return value <= self.asked if self.at_most else value >= self.asked

    def open(self, first: int, last: int) -> None:
        """Reads the amount, and sees whether it can be met at all between two positions."""
        end = first if self.is_goal else last
        self.asked = self.read(self.value(first))
        if not self.exact and not self.holds(end):  # a busy machine may have said so
            self.asked = self.read(self.value(first, anew=True))
            self.value(end, anew=True)
        if not self.holds(end) or (self.closed and self.asked > self.value(first)):
            raise self.unreachable(first, last)

    def unreachable(self, first: int, last: int) -> BudgetError:
        """What is said when nothing on the list keeps this budget."""
        low, high = sorted((self.value(last), self.value(first)))
        shares = "" if self.is_goal else f" ({low / high:.1%} to 100%)"
        hint = "; a share is written 1.0 or 100%" if self.closed and self.written in (1, "1") else ""
        asked = amount_text(self.kind, self.asked)
        return BudgetError(
            f"{self.kind}: asked {self.written!r} = {asked}, but the reachable range is "
            f"{amount_text(self.kind, low)} to {amount_text(self.kind, high)}{shares}{hint}"
        )

    def bound(self, position: int, first: int, last: int) -> Bound:
        """What was asked for and got."""
        low, high = sorted((self.value(last), self.value(first)))
        return Bound(self.kind, self.asked, self.value(position), low, high)


def meet(limits: Sequence[Limit], spec_at: Callable[[int], Spec], positions: Sequence[int]) -> Budget:
    """The sub-network of the list that keeps all budgets: the largest; the smallest if an accuracy is asked for.

    Costs are taken to fall along the list. Accuracy nearly does; where it does not, the sub-network found keeps the
    bound and the next smaller one on the list does not, though a still smaller one might.

    Args:
        limits: The budgets.
        spec_at: Spec at a position of the dropout list.
        positions: Positions that may be chosen, ascending; the first is 0.

    Raises:
        BudgetError: A budget cannot be read or is outside the reachable range, or they exclude each other.
    """
    dense, smallest = positions[0], positions[-1]
    costs = [limit for limit in limits if not limit.is_goal]
    goals = [limit for limit in limits if limit.is_goal]
    for limit in costs:
        limit.open(dense, smallest)
    index = 0
    for limit in sorted(costs, key=lambda limit: not limit.exact):
        index = _first(limit, positions, index)
    for limit in costs:
        if not limit.exact and not goals:
            index = _confirmed(limit, positions, index)
    for limit in goals:
        limit.open(dense, smallest)
        if not limit.holds(positions[index]):
            raise _conflict(limit, costs, positions[index])
    if goals:
        index = min(_last(limit, positions, index) for limit in goals)
        for limit in costs:
            if not limit.exact and not limit.value(positions[index], anew=True) <= limit.asked:
                raise _conflict(limit, goals, positions[index])
    position = positions[index]
    return Budget(tuple(limit.bound(position, dense, smallest) for limit in limits), position, spec_at(position))


def _conflict(limit: Limit, others: Sequence[Limit], position: int) -> BudgetError:
    """What is said when a budget is not kept by what the others leave."""
    size, got = "smallest" if others[0].is_goal else "largest", amount_text(limit.kind, limit.value(position))
    return BudgetError(
        f"{limit.kind}: asked {limit.written!r}, but the {size} sub-network within "
        f"{' and '.join(other.kind for other in others)} has {got}; ask for less, or allow it more"
    )


def _first(limit: Limit, positions: Sequence[int], start: int) -> int:
    """Index of the first position from `start` on that holds; the last one does."""
    if limit.exact:
        return bisect_left(positions, True, lo=start, hi=len(positions) - 1, key=limit.holds)
    if limit.holds(positions[start]):
        return start
    low, high = start, len(positions) - 1
    for _ in track(range((high - low).bit_length()), f"find {limit.kind}"):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        low, high = (low, middle) if limit.holds(positions[middle]) else (middle, high)
    return high


def _last(limit: Limit, positions: Sequence[int], start: int) -> int:
    """Index of a position from `start` on that holds while the next does not; `start` itself holds."""
    low, high = start, len(positions)
    for _ in track(range((high - low).bit_length()), f"find {limit.kind}"):
        middle = (low + high) // 2
        if middle == low:
            break
        low, high = (middle, high) if limit.holds(positions[middle]) else (low, middle)
    return low


def _confirmed(limit: Limit, positions: Sequence[int], index: int) -> int:
    """The index, or one further on whose value, taken anew, still holds: a lucky timing is not trusted.

    Raises:
        BudgetError: None holds.
    """
    step = max(1, len(positions) // 100)
    while True:
        limit.value(positions[index], anew=True)
        if limit.holds(positions[index]):
            return index
        if index == len(positions) - 1:
            raise limit.unreachable(positions[0], positions[-1])
        index = min(index + step, len(positions) - 1)
