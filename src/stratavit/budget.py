"""From a budget to a position in the dropout list: got <= asked, always, and by less than one unit."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import SupportsFloat, SupportsIndex

from stratavit.errors import BudgetError
from stratavit.spec import Spec

Amount = float | int | str
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Budget:
    """A budget that was met.

    Attributes:
        kind: ``macs`` or ``params``.
        asked: What was asked for, in absolute units.
        got: What the sub-network costs; never more than `asked`.
        low, high: The reachable range.
        position: Entries of the dropout list that are dropped.
        spec: The sub-network.
    """

    kind: str
    asked: int
    got: int
    low: int
    high: int
    position: int
    spec: Spec

    def __str__(self) -> str:
        share = f"{self.got / self.high:.1%} of the dense model"
        return (
            f"{self.kind}: asked {human(self.asked)}, got {human(self.got)} ({share}); "
            f"reachable {human(self.low)} to {human(self.high)}"
        )


def human(count: float) -> str:
    """A count with a unit: 1.08G, 5.72M."""
    for suffix in ("T", "G", "M", "K"):
        if abs(count) >= _SUFFIXES[suffix]:
            return f"{count / _SUFFIXES[suffix]:.4g}{suffix}"
    return f"{count:g}"


def parse_amount(amount: Amount, dense: int, name: str) -> int:
    """An absolute amount from a share (``0.5``, ``"50%"``) or an absolute value (an int, ``"2.1G"``).

    Raises:
        BudgetError: The amount is none of these, or a share outside (0, 1].
    """
    share = None
    if isinstance(amount, str):
        text = amount.strip()
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[KMGT]?)", text, re.IGNORECASE)
        if match is None:
            raise BudgetError(f"{name}: cannot read {amount!r}; give a share (0.5, '50%') or a count ('2.1G')")
        number, suffix = float(match[1]), match[2].upper()
        if suffix == "%":
            share = number / 100
        elif suffix == "" and "." in text:
            share = number
        else:
            return _whole(number * _SUFFIXES[suffix])
    elif isinstance(amount, bool) or not isinstance(amount, SupportsIndex | SupportsFloat):
        raise BudgetError(f"{name}: expected a share, a count or a text such as '50%', got {amount!r}")
    elif isinstance(amount, SupportsIndex):
        return index(amount)
    else:
        share = float(amount)
    if not 0 < share <= 1:
        raise BudgetError(f"{name}: a share must be above 0 and at most 1 (100%), got {amount!r}")
    return _whole(share * dense)


def _whole(count: float) -> int:
    """Rounded down, but forgiving what binary fractions lose: 1.005K is 1,005, and count / dense of dense is count."""
    return int(round(count, 3))


def meet(
    kind: str, amount: Amount, cost: Callable[[Spec], int], spec_at: Callable[[int], Spec], positions: Sequence[int]
) -> Budget:
    """The largest allowed prefix network whose cost does not exceed the budget, by bisection.

    Args:
        kind: For messages: ``macs`` or ``params``.
        amount: The budget, see `parse_amount`.
        cost: Cost of a spec; falls along the dropout list.
        spec_at: Spec at a position of the dropout list.
        positions: Positions that may be chosen, ascending; the first is 0.

    Raises:
        BudgetError: The budget cannot be read or is outside the reachable range.
    """
    high, low = cost(spec_at(positions[0])), cost(spec_at(positions[-1]))
    asked = parse_amount(amount, high, kind)
    if not low <= asked <= high:
        hint = "; a share is written 1.0 or 100%" if amount in (1, "1") else ""
        raise BudgetError(
            f"{kind}: asked {amount!r} = {human(asked)}, but the reachable range is {human(low)} to {human(high)} "
            f"({low / high:.1%} to 100%){hint}"
        )
    index = bisect_left(positions, True, key=lambda position: cost(spec_at(position)) <= asked)
    spec = spec_at(positions[index])
    return Budget(kind, asked, cost(spec), low, high, positions[index], spec)
