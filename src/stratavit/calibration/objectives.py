"""The scalar that a calibration pass differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stratavit.data.batches import check_labels
from stratavit.data.pixels import uniforms
from stratavit.errors import StrataViTError
from stratavit.models.families.base import Stages

Objective = Literal["auto", "label", "cross_entropy", "prediction", "sampled", "feature"]
OBJECTIVES: tuple[Objective, ...] = ("auto", "label", "cross_entropy", "prediction", "sampled", "feature")


@dataclass
class CalibrationObjective:
    """The scalar that is differentiated.

    Attributes:
        objective: See `collect`.
        likelihood: Whether ``auto`` means a log-likelihood rather than a logit.
        seed: Of the classes of ``sampled``.
        headless: The model's answer is the feature; else it is what the head reads.
    """

    objective: Objective
    likelihood: bool
    seed: int
    headless: bool = False

    def __call__(self, parts: Stages, tokens: Tensor, labels: Tensor | None, keys: Sequence[bytes]) -> Tensor:
        """Summed over the images.

        Args:
            parts: Of the model.
            tokens: ``[B, N, C]``, as they leave the last block.
            labels: ``[B]``.
            keys: Of the images, see `pixels.keys_of`.
        """
        objective = self.objective
        if objective == "auto":
            choices: tuple[Objective, Objective] = ("label", "prediction")
            choices = ("cross_entropy", "sampled") if self.likelihood else choices
            objective = choices[labels is None]
        if objective == "feature":
            return (parts.tail if self.headless else parts.pool)(tokens).float().square().sum() / 2
        logits = parts.tail(tokens).float()
        if labels is not None:
            labels = labels.to(logits.device)
        if objective == "sampled":
            labels = drawn_classes(logits, keys, self.seed).to(logits.device)
            objective = "cross_entropy"
        return objective_value(logits, labels, objective)


def drawn_classes(logits: Tensor, keys: Sequence[bytes], seed: int) -> Tensor:
    """A class for each image, drawn from the prediction; ``[B]`` on the CPU. Image and seed fix the draw."""
    upto = logits.detach().double().cpu().softmax(dim=-1).cumsum(dim=-1)  # [B, classes]
    drawn = torch.searchsorted(upto, uniforms(keys, seed)[:, None] * upto[:, -1:], right=True)
    return drawn.squeeze(1).clamp_max(logits.shape[-1] - 1)


def objective_value(logits: Tensor, labels: Tensor | None, objective: Objective) -> Tensor:
    """``label``, ``cross_entropy`` or ``prediction`` of logits ``[B, classes]``, summed over the images.

    Raises:
        StrataViTError: The objective needs labels and there are none, or they are out of range.
    """
    if objective == "prediction":
        return logits.amax(dim=-1).sum()
    if labels is None:
        raise StrataViTError(f"objective {objective!r} needs labels, but the loader gives none; use 'sampled'")
    check_labels(labels, logits.shape[-1])
    if objective == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="sum")
    return logits.gather(1, labels[:, None]).sum()
