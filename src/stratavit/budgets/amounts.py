"""Budgets: what was asked for, read from a number or a text, and what was got."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from operator import index
from typing import Any, SupportsFloat

from stratavit.errors import BudgetError
from stratavit.spec import TOKENS, Spec
from stratavit.utils.text import SUFFIXES, human

Amount = float | int | str
COUNTS = ("macs", "params")  # whole numbers, where a share is a float; the rest are absolute
GOALS = ("top1", "max_drop")  # accuracies; the rest are costs
KINDS = (*COUNTS, "memory_mb", "latency_ms", *GOALS)
_TEXT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[KMG]i?B|m?s|[KMGT]?)", re.IGNORECASE)
_FRACTION = re.compile(r"(\d+)\s*/\s*(\d+)")
_MEGABYTES = {"": 1.0, "KB": 1e-3, "MB": 1.0, "GB": 1e3, "KIB": 2**10 / 1e6, "MIB": 2**20 / 1e6, "GIB": 2**30 / 1e6}
_UNITS = {"memory_mb": _MEGABYTES, "latency_ms": {"": 1.0, "MS": 1.0, "S": 1e3}}
_MACS = re.compile(r"(?<=[\dKMGT])\s*MACs?", re.IGNORECASE)  # after a count of them
MOST = 100  # a count in digits alone up to this is a percentage without its sign: no network is so small


@dataclass(frozen=True)
class Bound:
    """One budget that is kept.

    Attributes:
        kind: ``macs``, ``params``, ``memory_mb``, ``latency_ms`` (got is at most asked), ``top1`` (at least) or
            ``max_drop`` (at most).
        asked: What was asked for, in absolute units.
        got: What the sub-network costs or reaches.
        low, high: The reachable range.
        spread: Standard error of `got`, where it is timed.
    """

    kind: str
    asked: float
    got: float
    low: float
    high: float
    spread: float = 0.0

    def __str__(self) -> str:
        share = "" if self.kind in GOALS else f" ({self.got / self.high:.1%} of the dense model)"
        asked, got, low, high = (amount_text(self.kind, x) for x in (self.asked, self.got, self.low, self.high))
        got += f" ± {self.spread:.2g}" if self.spread else ""
        return f"{self.kind}: asked {asked}, got {got}{share}; reachable {low} to {high}"


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

    @property
    def axes(self) -> str:
        """What is cut: ``width``, or ``both`` where blocks also merge tokens."""
        return "both" if any(name.endswith(TOKENS) for name in self.spec) else "width"

    def __str__(self) -> str:
        lines = [str(bound) for bound in self.bounds]
        if self.axes == "both":
            stock = "axes='width' (--axes width) cuts only widths"
            lines.append(f"blocks merge tokens, so it is not of stock classes alone; {stock}")
        return "\n".join(lines)


def amount_text(kind: str, amount: float) -> str:
    """An amount as it is printed: counts with a unit, measured values with four digits."""
    return human(amount) if kind in COUNTS else f"{amount:.4g}"


def parse(kind: str, amount: Amount, dense: float) -> float:
    """The absolute amount of a budget, given the dense model's.

    Args:
        kind: Counts (``macs``, ``params``) are a share (``0.5``, ``"50%"``, ``"8/12"``) or absolute (an int,
            ``"2.1G"``, ``"600M MACs"``); ``memory_mb`` and ``latency_ms`` a number (``12``, ``"12.5"``, ``"12MB"``,
            ``"12MiB"``, ``"8ms"``, ``"0.01s"``) or a share (``"50%"``, ``"8/12"``); accuracies are percent of images
            (``75``, ``"75"``, ``"75%"``).
        amount: What was written.
        dense: Of the dense model; accuracies do not need it.

    Raises:
        BudgetError: The amount is none of these, or out of range.
    """
    if kind in GOALS:
        return _percent(kind, amount)
    if isinstance(amount, str) and kind == "macs":
        amount = _MACS.sub("", amount)
    fraction = _FRACTION.fullmatch(amount.strip()) if isinstance(amount, str) else None
    if fraction is not None:
        share = _share(kind, int(fraction[1]) / max(int(fraction[2]), 1e-9), amount)
        return int(round(share * dense, 3)) if kind in COUNTS else share * dense
    if kind in COUNTS:
        return _count(kind, amount, dense)
    units = _UNITS[kind]
    expected = f"a number above 0, also with a unit ({', '.join(filter(None, units))}), or a share such as '50%'"
    value, unit = _number(kind, amount, expected, ("%", *units))
    if unit == "%":
        return _share(kind, value / 100, amount) * dense
    if not 0 < value < float("inf"):
        raise BudgetError(f"{kind}: expected {expected}, got {amount!r}")
    return value * units[unit]


def check_amount(kind: str, amount: Amount) -> None:
    """Reads an amount as far as that needs no network, so that a mistake is found before any work.

    Raises:
        BudgetError: See `parse`.
    """
    parse(kind, amount, 10.0**9)


def _percent(kind: str, amount: Amount) -> float:
    """An accuracy, or a loss of it; a text that may be a share is asked about."""
    expected = "percent of images from 0 to 100, such as 75 or '75%'"
    value, unit = _number(kind, amount, expected, ("", "%"))
    if not 0 <= value <= 100 or (kind == "top1" and 0 < value < 1 and not isinstance(amount, str)):
        raise BudgetError(f"{kind}: expected {expected}, got {amount!r}")
    if isinstance(amount, str) and not unit and 0 < value < 1:
        raise BudgetError(
            f"{kind}: expected {expected}, got {amount!r}; did you mean {100 * value:g}%? If not, write {value:g}%"
        )
    return value


def _count(kind: str, amount: Any, dense: float) -> int:
    with suppress(TypeError):  # a float, a text, or an array of one share
        if not isinstance(amount, bool):
            return index(amount)
    number, unit = _number(kind, amount, "a share (0.5, '50%', '8/12') or a count ('2.1G')", ("%", *SUFFIXES))
    if unit == "%":
        number /= 100
    elif unit or (isinstance(amount, str) and "." not in amount):
        if not unit and 1 <= number <= MOST:
            meant = "100%, also written 1.0" if number == 1 else f"{number:g}%"
            raise BudgetError(f"{kind}: {amount!r} is a count, and no network has so few; did you mean {meant}?")
        return int(Decimal(str(number)) * SUFFIXES[unit])
    elif 1 < number <= MOST:
        raise BudgetError(f"{kind}: a share must be above 0 and at most 1, got {amount!r}; did you mean {number:g}%?")
    return int(
        round(_share(kind, number, amount) * dense, 3)
    )  # down, but a count over dense, times dense, is the count


def _number(kind: str, amount: Any, expected: str, units: Sequence[str]) -> tuple[float, str]:
    """The number, and the unit that follows it in a text."""
    match = _TEXT.fullmatch(amount.strip()) if isinstance(amount, str) else None
    if match is not None and match[2].upper() in units:
        return float(match[1]), match[2].upper()
    with suppress(TypeError, ValueError, RuntimeError):  # an array of several
        if isinstance(amount, SupportsFloat) and not isinstance(amount, bool):
            return float(amount), ""
    raise BudgetError(f"{kind}: expected {expected}, got {amount!r}")


def _share(kind: str, share: float, amount: Amount) -> float:
    if not 0 < share <= 1:
        raise BudgetError(f"{kind}: a share must be above 0 and at most 1 (100%), got {amount!r}")
    return share
