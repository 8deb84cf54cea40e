"""Models timed in turns, until their times relative to the first are known well enough; and how well they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from stratavit.evaluation import latency
from stratavit.evaluation.latency import AT_LEAST_RUNS, Setting, TimedCall

ROUNDS = 10  # in the seconds of a setting
MOST = 3  # times these seconds, where the spread is too large
PRECISION = 0.01  # standard error of a ratio that is small enough
NOISY = 0.15  # half the range of the middle half of the passes, as a share of their median
Rounds = Sequence[Sequence[float]]  # seconds of every pass, round by round


@dataclass(frozen=True)
class Ratio:
    """Time of a model over that of the first one.

    Attributes:
        value: Median over the rounds of the ratio of their medians: what is slow in one round is slow for all.
        spread: Its standard error, as a share of the value, from how much rounds differ.
    """

    value: float
    spread: float

    @classmethod
    def of(cls, times: Rounds, first: Rounds) -> Ratio:
        """From passes that took turns with those of the first model."""
        ratios = [median(own) / median(other) for own, other in zip(times, first, strict=True)]
        middle = median(ratios)
        deviation = 1.4826 * median(abs(ratio - middle) for ratio in ratios)  # a standard deviation, robustly
        return cls(middle, 1.2533 * deviation / middle / len(ratios) ** 0.5)


def flat(times: Rounds) -> list[float]:
    """The passes of all rounds."""
    return [seconds for part in times for seconds in part]


def take_turns(passes: Sequence[TimedCall], setting: Setting, precision: float = PRECISION) -> list[list[list[float]]]:
    """Times models side by side, so that a machine that slows down slows all.

    Args:
        passes: One for each model; the first is the one that others are compared with.
        setting: Its seconds are spent on every model, and up to `MOST` times as many until ratios are precise.
        precision: Relative standard error of every ratio that is precise enough.

    Returns:
        Model -> round -> seconds of each pass.
    """
    part = dataclasses.replace(setting, seconds=setting.seconds / ROUNDS)
    times: list[list[list[float]]] = [[] for _ in passes]
    while True:
        for known, one in zip(times, passes, strict=True):
            known.append(latency.pass_times(one, part, 1))
        spent = min(sum(flat(known)) for known in times)
        if len(times[0]) < AT_LEAST_RUNS or spent < setting.seconds:
            continue
        if spent >= MOST * setting.seconds or all(Ratio.of(x, times[0]).spread <= precision for x in times[1:]):
            return times


def unrest(times: Rounds) -> float:
    """By how much passes of one model differ: half the range of the middle half, as a share of the median."""
    low, middle, high = quantiles(flat(times), n=4)
    return (high - low) / 2 / middle


def noise_note(share: float) -> str:
    """What to know if passes differ by such a share; empty if the machine is quiet."""
    if share <= NOISY:
        return ""
    return (
        f"passes of one model vary by {share:.0%}: the machine is busy; models took turns, so their ratios hold within "
        "the spread, but milliseconds may not; close other programs and time again"
    )
