"""Budgets: what was asked for, read from a number or a text, and what was got."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsFloat, SupportsIndex

from stratavit.errors import BudgetError
from stratavit.spec import Spec
from stratavit.utils.text import SUFFIXES, human

Amount = float | int | str
COUNTS = ("macs", "params")  # whole numbers, where a share is a float; the rest are absolute
_DENSE_IS_HIGHEST = (*COUNTS, "memory_mb", "latency_ms")


@dataclass(frozen=True)
class Bound:
    """One budget that is kept.

    Attributes:
        kind: ``macs``, ``params``, ``memory_mb``, ``latency_ms`` (got is at most asked), ``top1`` (at least) or
            ``max_drop`` (at most).
        asked: What was asked for, in absolute units.
        got: What the sub-network costs or reaches.
        low, high: The reachable range.
    """

    kind: str
    asked: float
    got: float
    low: float
    high: float

    def __str__(self) -> str:
        share = f" ({self.got / self.high:.1%} of the dense model)" if self.kind in _DENSE_IS_HIGHEST else ""
        low, high = amount_text(self.kind, self.low), amount_text(self.kind, self.high)
        return (
            f"{self.kind}: asked {amount_text(self.kind, self.asked)}, got {amount_text(self.kind, self.got)}{share}; "
            f"reachable {low} to {high}"
        )


@dataclass(frozen=True)
class Budget:
    """A budget that was met, or several.

    Attributes:
        bounds: Each of them.
        position: Entries of the dropout list that are dropped.
        spec: The sub-network.
    """

    bounds: tuple[Bound, ...]
    position: int
    spec: Spec

    @property
    def kind(self) -> str:
        """Of the first bound."""
        return self.bounds[0].kind

    @property
    def asked(self) -> float:
        """Of the first bound, in absolute units."""
        return self.bounds[0].asked

    @property
    def got(self) -> float:
        """Of the first bound."""
        return self.bounds[0].got

    @property
    def low(self) -> float:
        """End of the first bound's reachable range."""
        return self.bounds[0].low

    @property
    def high(self) -> float:
        """End of the first bound's reachable range."""
        return self.bounds[0].high

    def __str__(self) -> str:
        return "\n".join(str(bound) for bound in self.bounds)


def amount_text(kind: str, amount: float) -> str:
    """An amount as it is printed: counts with a unit, measured values with four digits."""
    return human(amount) if kind in COUNTS else f"{amount:.4g}"


def parse_amount(amount: Amount, dense: int, name: str) -> int:
    """An absolute count from a share (``0.5``, ``"50%"``) or an absolute value (an int, ``"2.1G"``).

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
            return _whole(number * SUFFIXES[suffix])
    elif isinstance(amount, bool) or not isinstance(amount, SupportsIndex | SupportsFloat):
        raise BudgetError(f"{name}: expected a share, a count or a text such as '50%', got {amount!r}")
    else:
        try:
            if isinstance(amount, SupportsIndex):
                return index(amount)
        except TypeError:  # an array or tensor of one share has the method, too
            pass
        share = _float(amount, name, "a share, a count or a text such as '50%'")
    return _whole(_checked_share(share, amount, name) * dense)


def parse_measure(amount: Amount, dense: float, name: str) -> float:
    """An absolute amount of milliseconds or megabytes from a number (``12``, ``"12.5"``) or a share (``"50%"``).

    Raises:
        BudgetError: The amount is none of these, or not above 0.
    """
    value, percent = _number(amount, name, "a number above 0, or a share such as '50%'")
    if percent:
        return _checked_share(value / 100, amount, name) * dense
    if not 0 < value < float("inf"):
        raise BudgetError(f"{name}: expected a number above 0, got {amount!r}")
    return value


def parse_points(amount: Amount, name: str) -> float:
    """Percent of images: ``75``, ``"75"`` and ``"75%"`` are the same.

    Raises:
        BudgetError: The amount is none of these, or not from 0 to 100.
    """
    value, _ = _number(amount, name, "percent of images, such as 75 or '75%'")
    if not 0 <= value <= 100:
        raise BudgetError(f"{name}: expected percent of images from 0 to 100, got {amount!r}")
    if name == "top1" and 0 < value < 1 and not isinstance(amount, str):
        raise BudgetError(f"{name}: expected percent of images such as 75, got the share {amount!r}")
    return value


def _number(amount: Amount, name: str, expected: str) -> tuple[float, bool]:
    """The number, and whether a percent sign followed."""
    if isinstance(amount, str):
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", amount.strip())
        if match is None:
            raise BudgetError(f"{name}: cannot read {amount!r}; give {expected}")
        return float(match[1]), match[2] == "%"
    if isinstance(amount, bool) or not isinstance(amount, SupportsFloat):
        raise BudgetError(f"{name}: expected {expected}, got {amount!r}")
    return _float(amount, name, expected), False


def _float(amount: Any, name: str, expected: str) -> float:
    try:
        return float(amount)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of several
        raise BudgetError(f"{name}: expected {expected}, got {amount!r}") from error


def _checked_share(share: float, amount: Amount, name: str) -> float:
    if not 0 < share <= 1:
        raise BudgetError(f"{name}: a share must be above 0 and at most 1 (100%), got {amount!r}")
    return share


def _whole(count: float) -> int:
    """Rounded down, but forgiving what binary fractions lose: 1.005K is 1,005, and count / dense of dense is count."""
    return int(round(count, 3))
