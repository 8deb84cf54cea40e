"""The scalars that are differentiated: of a calibration pass, and the distance of a small network from a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stratavit.calibration.accumulators import wide
from stratavit.choices import OBJECTIVES as OBJECTIVES
from stratavit.choices import Measure as Measure
from stratavit.choices import Objective as Objective
from stratavit.data.batches import check_labels
from stratavit.data.pixels import uniforms
from stratavit.errors import StrataViTError
from stratavit.models.families.base import Stages
from stratavit.utils.devices import to_device


@dataclass(frozen=True)
class CalibrationObjective:
    """The scalar that a calibration pass differentiates.

    Attributes:
        objective: See `statistics.collect`.
        likelihood: Whether ``auto`` means a log-likelihood rather than a logit.
        seed: Of the classes of ``sampled``.
        headless: The model's output is the feature, or a map of tokens; else the feature is what the head reads.
    """

    objective: Objective
    likelihood: bool
    seed: int
    headless: bool = False

    def __call__(self, parts: Stages, tokens: Tensor, labels: Tensor | None, keys: Sequence[bytes]) -> Tensor:
        """The scalar, in float32 or wider, summed over images; `tokens` ``[B, N, C]`` are those of the last block.

        Raises:
            StrataViTError: The objective needs labels and there are none, or they are out of range.
        """
        objective = self.objective
        if objective == "auto" and self.likelihood:
            objective = "sampled" if labels is None else "cross_entropy"
        elif objective == "auto":
            objective = "prediction" if labels is None else "label"
        if objective == "feature":
            return (parts.tail if self.headless else parts.pool)(tokens).float().square().sum() / 2
        logits = parts.tail(tokens).float()
        if objective == "prediction":
            return logits.amax(dim=-1).sum()
        if objective == "sampled":
            labels = drawn_classes(logits, keys, self.seed)
        elif labels is None:
            raise StrataViTError(f"objective {objective!r} needs labels, but the loader gives none; use 'sampled'")
        else:
            check_labels(labels, logits.shape[-1])  # where they are: read back from a GPU, they would be waited for
        labels = to_device(labels, logits.device)
        if objective == "label":
            return logits.gather(1, labels[:, None]).sum()
        return F.cross_entropy(logits, labels, reduction="sum")


def drawn_classes(logits: Tensor, keys: Sequence[bytes], seed: int) -> Tensor:
    """A class for each image, drawn from the prediction; ``[B]``, there. Image and seed fix the draw."""
    upto = wide(logits.detach()).softmax(dim=-1).cumsum(dim=-1)  # [B, classes]
    chances = to_device(uniforms(keys, seed), upto.device)
    drawn = torch.searchsorted(upto, chances[:, None] * upto[:, -1:], right=True)
    return drawn.squeeze(1).clamp_max(logits.shape[-1] - 1)


def distance(small: Tensor, dense: Tensor, classes: int) -> Tensor:
    """KL(dense || small) of logits ``[B, classes]``, summed; without a head the relative squared distance."""
    small, dense = small.float(), dense.float()
    if classes:
        return F.kl_div(small.log_softmax(dim=-1), dense.log_softmax(dim=-1), reduction="sum", log_target=True)
    return relative_errors(small, dense).sum()


def relative_errors(small: Tensor, dense: Tensor) -> Tensor:
    """Squared distance over squared length of `dense` ``[B, ...]`` for every image, in float32: ``[B]``.

    Of maps the length is that of all tokens of an image together.
    """
    small, dense = small.float().flatten(1), dense.float().flatten(1)
    return (small - dense).square().sum(dim=1) / dense.square().sum(dim=1).clamp_min(1e-12)
