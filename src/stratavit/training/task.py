"""What the training loop needs to know of a model that it trains: the base class of tasks."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.utils import ModelEmaV3

from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.spec import Spec
from stratavit.training.recipe import Recipe
from stratavit.training.verdict import verdict


class SampledNetwork(NamedTuple):
    """A sub-network to run: its widths, its MACs per image, and its position in the list if it has one."""

    spec: Spec
    macs: int
    position: int | None = None


class TrainingTask(ABC):
    """A network in training: see `piad_task.PiadTask`, `finetune.FinetuneTask` and `recover_task.RecoverTask`.

    Args:
        net: Called with images and a spec; its `model` is the timm model whose weights are trained. It is moved to the
            accelerator's device, in float32.
        full_macs: MACs per image at full size.
        recipe: Averaging, and which weights are kept.
        steps, accelerator: Of the run.

    Attributes:
        kind: A word for the state, so that it is not resumed as something else.
        proxy: Images that are measured on, if any.
        ema: timm's averaged copy of `net`, or None.
        finished: Whether to end after this epoch, though some are left.
    """

    kind: str
    proxy: Iterable[Any] | None = None
    finished = False

    def __init__(self, net: Any, full_macs: int, recipe: Recipe, steps: int, accelerator: Any) -> None:
        self.net, self.full_macs, self.recipe, self.accelerator = net, full_macs, recipe, accelerator
        net.float().to(accelerator.device)
        decay = recipe.decay(steps)
        self.ema = ModelEmaV3(net, decay) if decay else None

    @property
    def eval_net(self) -> Any:
        """The network that is evaluated and kept: averaged or raw weights."""
        return self.net if self.ema is None or self.recipe.keep == "raw" else self.ema.module

    def target(self) -> Any:
        """What mixes images and computes the loss, see `augmentation.Target`; None for that of labels or features."""
        return None

    def verdict(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Warnings about the finished run, from the rows of its log."""
        return verdict(rows)

    def begin_stage(self, stage: int) -> None:  # noqa: B027
        """Whatever is measured on the weights now and then, `Recipe.growths` times per epoch."""

    @abstractmethod
    def draw(self, generator: random.Random) -> list[SampledNetwork]:
        """Networks that one batch runs."""

    def facts(self) -> dict[str, Any]:
        """Numbers for the log, at the end of an epoch."""
        return {}

    @abstractmethod
    def evaluate(self, loader: Iterable[Any]) -> list[curve_points.Point]:
        """Accuracy, largest network first."""

    @abstractmethod
    def graduate(self, facts: dict[str, Any]) -> None:
        """Gives `net` the weights to keep, in eval mode; `facts` go into its provenance."""

    @abstractmethod
    def publish(self, folder: Path, points: list[curve_points.Point]) -> None:
        """Writes the result and the last evaluation into the run's folder."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values: weights, averaged weights."""
        averaged = None if self.ema is None else self.ema.module.model.state_dict()
        return {"weights": self.net.model.state_dict(), "ema": averaged}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned; that of another model is refused."""
        weights, averaged = state["weights"], state["ema"]
        try:
            self.net.model.load_state_dict(weights)
            if self.ema is not None:
                self.ema.module.model.load_state_dict(averaged)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise StrataViTError("this is the state of another model; resume with the one it began with") from error
