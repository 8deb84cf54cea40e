"""What the training loop asks of that which it trains."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stratavit.evaluation import curve_points
from stratavit.spec import Spec


class SampledNetwork(NamedTuple):
    """A sub-network to run: its widths, its MACs per image, and its position in the list if it has one."""

    spec: Spec
    macs: int
    position: int | None = None


class TrainingTask(Protocol):
    """What is trained: `piad_task.PiadTask` (a super-network) or `finetune.FinetuneTask` (one small model).

    Attributes:
        kind: A word for the state, so that none is resumed as something else.
        net: Called with images and a spec; its `model` is the timm model whose weights are trained.
        ema: timm's averaged copy, or None.
        full_macs: MACs per image at full size.
    """

    kind: str
    net: Any
    ema: Any
    full_macs: int

    def begin_stage(self, stage: int) -> None:
        """Whatever is measured on the weights now and then, `Recipe.growths` times per epoch."""

    def draw(self, generator: random.Random) -> list[SampledNetwork]:
        """Networks that one batch runs."""

    def facts(self) -> dict[str, Any]:
        """Numbers for the log, at the end of an epoch."""

    def evaluate(self, loader: Iterable[Any]) -> list[curve_points.Point]:
        """Accuracy, largest network first."""

    def graduate(self, facts: dict[str, Any]) -> None:
        """Takes the weights to keep, and notes how they were made."""

    def publish(self, folder: Path, points: list[curve_points.Point]) -> None:
        """Writes the result, and the last evaluation."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave."""
