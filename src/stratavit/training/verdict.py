"""Whether a run has learned anything, from what it was measured to do before and after."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from stratavit.evaluation.curve_points import Point, curves

_SMALLEST_FALL = 0.05  # of the loss, as a share, that counts as learning where top-1 stays as it was
_REMEDY = "train longer (more epochs), or at a higher lr"


def first_curve(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """What was measured before the first step; empty if nothing was."""
    return next((points for epoch, points in curves(rows) if epoch == 0), [])


def verdict(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Warnings about a finished run, from the rows of its log; empty if it has learned.

    Without an evaluation the mean losses of its first and its last epoch are compared.
    """
    rows = list(rows)
    evaluated = curves(rows)
    if len(evaluated) < 2 or evaluated[0][0] > 0:
        losses = [row["loss"] for row in rows if row["kind"] == "epoch"]
        if len(losses) < 2 or losses[-1] < losses[0]:
            return []
        return [f"nothing was learned: the loss went from {losses[0]:.3g} to {losses[-1]:.3g}; {_REMEDY}"]
    before = {point.asked: point for point in evaluated[0][1]}
    pairs = [(before[point.asked], point) for point in evaluated[-1][1] if point.asked in before]
    worse = [f"{new.asked} ({old.top1:.1f} to {new.top1:.1f})" for old, new in pairs if _gain(old, new) < -1]
    found = [f"top-1 is lower than before at {', '.join(worse)}: train at a lower lr"] if worse else []
    if pairs and not worse and not any(_has_learned(old, new) for old, new in pairs):
        old, new = pairs[0]
        chance = "" if new.top1 <= old.top1 else f", no more than chance among {new.n} images"
        found.append(f"nothing was learned: top-1 went from {old.top1:.1f} to {new.top1:.1f} %{chance}; {_REMEDY}")
    return found


def report_verdict(warnings: Iterable[str]) -> None:
    """Says on standard error what `verdict` warns of."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _gain(old: Point, new: Point) -> float:
    """By how many standard errors of a difference top-1 has risen; the errors are those of the larger variance."""
    share = min((old, new), key=lambda point: abs(point.top1 - 50)).top1 / 100
    error = 100 * math.sqrt(2 * max(share * (1 - share), 0.25 / new.n) / new.n)
    return (new.top1 - old.top1) / error


def _has_learned(old: Point, new: Point) -> bool:
    return _gain(old, new) > 1 or new.loss < old.loss * (1 - _SMALLEST_FALL)
