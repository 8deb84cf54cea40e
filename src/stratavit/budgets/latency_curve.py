"""Latency along a dropout list: sizes timed in turns with the dense model, and a cost model fitted to them.

A timing of one size is as uncertain as the machine is busy. All timings together determine a model with few numbers:
a pass costs something in any case, something per MAC, and something per module that is left. What a size differs from
it is believed as far as it exceeds the spread of its timing. Where other programs take the processors, sizes are
compared with one thread each, which slows down evenly.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stratavit.dropout_list.strata import Strata
from stratavit.evaluation import latency, turns
from stratavit.evaluation.crowding import CROWDED, share_waited
from stratavit.evaluation.latency import Setting
from stratavit.evaluation.turns import Ratio
from stratavit.utils.model import model_device
from stratavit.utils.progress import track

SIZES = 7  # timed at most
FINE = 0.005  # share of the MACs; a neighbour so near needs no timing of its own
LEAST = 1e-3  # spread that is taken for certain


@dataclass(frozen=True)
class Sample:
    """One size that was timed: its place among the positions, and its time over the dense model's."""

    index: int
    ratio: Ratio


class LatencyCurve:
    """Milliseconds at every position of a dropout list, falling along it.

    Args:
        net: The `SuperNet`.
        strata: Its list.
        positions: That may be chosen, first to last.
        setting: How a model is run.

    Attributes:
        samples: What was timed, in order.
        dense: Seconds of the dense model, round by round.
        timed: How models are run to compare them.
    """

    def __init__(self, net: Any, strata: Strata, positions: Sequence[int], setting: Setting) -> None:
        self.net, self.strata, self.positions, self.setting = net, strata, positions, setting
        self.samples: list[Sample] = []
        self.dense: list[list[float]] = []
        self.timed = setting
        self._crowded: list[float] = []  # seconds of the dense model as the setting runs it, if it is not run so below
        self._ratios: list[float] = []

    @cached_property
    def features(self) -> Tensor:
        """MACs and modules that are left at each of the positions, as shares of the dense model's, ``[P, 2]``."""
        specs = [self.strata.spec(position) for position in self.positions]
        rows = [[float(self.net.macs(spec)), float(sum(map(bool, spec.values())))] for spec in specs]
        return torch.tensor(rows, dtype=torch.float64) / torch.tensor(rows[0], dtype=torch.float64)

    @cached_property
    def _reference(self) -> latency.TimedCall:
        return self._call(self.positions[0])

    def _call(self, position: int) -> latency.TimedCall:
        small = self.net.small_at(self.strata.spec(position))
        return latency.runner(small, self.net.data_config["input_size"], self.timed)

    def time(self, index: int) -> None:
        """Times one size in turns with the dense model."""
        first, own = turns.take_turns([self._reference, self._call(self.positions[index])], self.timed)
        self.dense += first
        self.samples.append(Sample(index, Ratio.of(own, first)))
        self._ratios = fitted(self.features, self.samples)

    @property
    def dense_ms(self) -> float:
        """Of the dense model, the median of all passes."""
        return 1000 * median(self._crowded or turns.flat(self.dense))

    def __call__(self, position: int) -> float:
        """Milliseconds per batch; `aim` first."""
        return self.dense_ms * self._ratios[self.positions.index(position)]

    def spread(self, position: int) -> float:
        """Standard error of what `__call__` gives, in milliseconds, from the timings of sizes near it."""
        index = self.positions.index(position)
        return self(position) * _pooled(self._by_distance(index)[:3]) if index else 0.0

    def aim(self, asked: Callable[[float], float]) -> float:
        """Times sizes ever nearer to the one that a budget chooses.

        Args:
            asked: Milliseconds of the dense model -> those of the budget.

        Returns:
            Milliseconds asked for.

        Raises:
            BudgetError: The amount cannot be read.
        """
        asked(1.0)  # refused before any work
        self._avoid_crowding()
        last = len(self.positions) - 1
        self.time(last)
        target = asked(self.dense_ms)
        for _ in track(range(SIZES - 1), "find latency_ms"):
            index = self._choice(target / self.dense_ms)
            unknown = [x for x in (index, index - 1) if x > 0 and not self._known(x)]  # it holds, the next larger not
            if not unknown:
                break
            self.time(unknown[0])
            target = asked(self.dense_ms)
        if note := turns.noise_note(turns.unrest(self.dense)):
            print(f"latency: {note}", file=sys.stderr)
        return target

    def _avoid_crowding(self) -> None:
        """Compares sizes with one thread if several would wait for processors, and so for one another."""
        if self.setting.used_threads == 1 or model_device(self.net).type != "cpu":
            return
        reference, passes = self._reference, list[float]()
        waited = share_waited(lambda: passes.extend(latency.pass_times(reference, self.setting, 1)))
        if waited < CROWDED:
            return
        self._crowded = passes
        self.timed = dataclasses.replace(self.setting, threads=1)
        del self._reference  # which runs as `timed` says
        print(
            f"latency: other programs take the processors ({waited:.0%} of the time of {self.setting.used_threads} "
            "threads went by waiting for one): sizes are compared with one thread each, which changes their ratios a "
            "little, and milliseconds may not hold; close other programs and ask again",
            file=sys.stderr,
        )

    def _choice(self, ratio: float) -> int:
        """The first position whose time is within a ratio, or the last."""
        return next((index for index, own in enumerate(self._ratios) if own <= ratio), len(self._ratios) - 1)

    def _by_distance(self, index: int, within: float = 1.0) -> list[Sample]:
        """The timings of sizes near a position, the nearest first; distances are shares of the MACs."""
        x = self.features[:, 0]
        near = [sample for sample in self.samples if abs(float(x[sample.index] - x[index])) <= within]
        return sorted(near, key=lambda sample: abs(float(x[sample.index] - x[index])))

    def _known(self, index: int) -> bool:
        """Whether sizes so near to a position were timed that another timing would say nothing new."""
        near = self._by_distance(index, FINE)
        return bool(near) and _pooled(near) <= turns.PRECISION


def _pooled(samples: Sequence[Sample]) -> float:
    """Standard error of the mean of several timings."""
    return float(sum(max(sample.ratio.spread, LEAST) ** -2 for sample in samples) ** -0.5)


def fitted(features: Tensor, samples: Sequence[Sample]) -> list[float]:
    """The ratio at every position: a line in the features, and what timings say beyond their spread.

    Args:
        features: Of every position, ``[P, F]``, falling; those of the first, the dense model, are 1.
        samples: Timings, one at least.

    Returns:
        Ratios, 1 at the first position, falling.
    """
    at = torch.tensor([sample.index for sample in samples])
    ratios = torch.tensor([sample.ratio.value for sample in samples], dtype=torch.float64)
    spreads = torch.tensor([max(sample.ratio.spread, LEAST) for sample in samples], dtype=torch.float64) * ratios
    below, columns = 1 - features, list(range(features.shape[1]))
    while True:  # least squares without negative prices
        prices = torch.linalg.lstsq(below[at][:, columns] / spreads[:, None], ((1 - ratios) / spreads)[:, None])
        solution = prices.solution[:, 0]
        if bool((solution >= 0).all()) or len(columns) == 1:
            break
        columns.pop(int(solution.argmin()))
    line = 1 - below[:, columns] @ solution.clamp_min(0)
    left = ratios - line[at]
    left = left * (1 - (spreads / left.abs().clamp_min(1e-12)) ** 2).clamp_min(0)
    curve = (line + _between(features[:, 0], features[at, 0], left)).clamp_min(float(ratios.min()) / 2)
    return list(accumulate(curve.tolist(), min, initial=1.0))[1:]


def _between(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Values between known points, by straight lines; 0 at the dense model; several at one point are averaged."""
    places, order = torch.unique(at, return_inverse=True)
    means = torch.zeros_like(places).index_add(0, order, values) / torch.bincount(order)
    places, means = torch.cat([places, x[:1]]), torch.cat([means, torch.zeros(1).double()])
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    low, high = places[right - 1], places[right]
    weight = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return means[right - 1] * (1 - weight) + means[right] * weight
