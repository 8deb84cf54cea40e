"""AdamW with a cosine schedule, both by timm, and the watch over the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from stratavit.training import distributed
from stratavit.training.recipe import Learn, Recipe
from stratavit.utils.model import temporarily

if TYPE_CHECKING:
    from stratavit.training.task import SampledNetwork

LEAST_SIZE = 1e-3  # of weights, for a relative rate: those that are zero must be able to learn


def optimiser_and_schedule(model: nn.Module, recipe: Recipe, images: int, epoch_steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule per step, a function of the step's number alone.

    The weights of a module that a step skips have no gradient, so the step does not touch them, decay included.
    Weights cut from a module that runs have gradient 0: they decay, and follow their momentum. Norms, biases and tokens
    are spared from decay. The rate follows the global batch (`Recipe.lr_scaling`); one below `Recipe.min_lr` is
    constant. Tensors may learn at multiples of it, see `rate_scale`.
    """
    rate = recipe.rate(images)
    least = min(recipe.min_lr, rate)  # neither the cosine nor the warm-up goes the other way
    kernel = {"fused": True} if on_cuda(model) else {}  # keeps its count of steps on the device, too
    optimiser = create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=recipe.weight_decay, **kernel)
    _scale_rates(optimiser, recipe)
    warmup = recipe.warmup_epochs * epoch_steps
    options = {"warmup_t": warmup, "warmup_lr_init": least if warmup else 0.0, "t_in_epochs": False}
    return optimiser, CosineLRScheduler(optimiser, recipe.epochs * epoch_steps, least, **options)


def on_cuda(model: nn.Module) -> bool:
    """Whether all weights are on CUDA."""
    return all(parameter.device.type == "cuda" for parameter in model.parameters())


def _scale_rates(optimiser: Any, recipe: Recipe) -> None:
    """Groups the tensors by their multiples of the rate, which timm's schedule reads as ``lr_scale``."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            groups.setdefault((rate_scale(parameter, recipe), group["weight_decay"]), []).append(parameter)
    optimiser.param_groups.clear()
    for (scale, decay), parameters in groups.items():
        optimiser.add_param_group({"params": parameters, "weight_decay": decay, "lr_scale": scale})


def rate_scale(parameter: Tensor, recipe: Recipe) -> float:
    """The multiple of the rate that a tensor of weights learns at, by a recipe.

    Vectors (biases, norms, LayerScale) have `Recipe.bias_norm_lr_scale`. A ``relative`` rate is that times the root
    mean square of the weights, as in Adafactor (arXiv 1804.04235, section 8), rounded to a power of the square root of
    two, so that few groups of tensors suffice. What changes other weights (`elastic.delta`) learns at twice the rate of
    those: a module at half of its width adds half of it.
    """
    changed = getattr(parameter, "changes", None)
    scale = (recipe.bias_norm_lr_scale if parameter.dim() < 2 else 1.0) * (1.0 if changed is None else 2.0)
    if recipe.lr_unit == "absolute":
        return scale
    weights = parameter if changed is None else changed
    size = max(float(weights.detach().float().square().mean().sqrt()), LEAST_SIZE)
    return scale * float(2 ** (round(2 * math.log2(size)) / 2))


@contextmanager
def learning(model: nn.Module, what: Learn) -> Iterator[None]:
    """Runs the body with gradients for these weights alone: ``bias+norm`` are those that are vectors."""
    others = [parameter for parameter in model.parameters() if parameter.dim() > 1] if what == "bias+norm" else []
    with temporarily("requires_grad", dict.fromkeys(others, False)):
        yield


class Losses:
    """Losses of the passes since the last look, kept on the device, and the mean of the epoch."""

    def __init__(self) -> None:
        self.sum = self.count = 0.0
        self._pending: list[tuple[int, SampledNetwork, Tensor]] = []

    def add(self, step: int, drawn: SampledNetwork, loss: Tensor) -> None:
        """Remembers one pass: number of the step, what ran, loss."""
        self._pending.append((step, drawn, loss.detach()))

    def look(self) -> tuple[int, SampledNetwork, float] | None:
        """Adds what is pending, of all processes, to the mean; waits for the device.

        Returns:
            Step, sub-network and loss of the first pass with a loss that is not finite (on another process: of the last
            pass here), or None.
        """
        if not self._pending:
            return None
        losses = torch.stack([loss for _, _, loss in self._pending]).tolist()
        everywhere = distributed.gather(losses)
        for loss in everywhere:  # one by one: the mean does not depend on when one looked
            self.sum += loss
        self.count += len(everywhere)
        bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), -1)
        step, drawn, _ = self._pending[bad]
        self._pending.clear()
        return None if math.isfinite(sum(everywhere)) else (step, drawn, losses[bad])

    def take_mean(self) -> float:
        """Mean over the epoch; starts a new one."""
        mean = self.sum / max(self.count, 1.0)
        self.sum = self.count = 0.0
        return mean
