"""How far the outputs of two networks are apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance over squared length of `theirs` ``[B, ...]``, mean over images, in float32."""
    ours, theirs = ours.float().flatten(1), theirs.float().flatten(1)
    return ((ours - theirs).square().sum(dim=1) / theirs.square().sum(dim=1).clamp_min(1e-12)).mean()


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL divergence from the distribution of other logits ``[B, classes]``, nats, mean over images, in float32."""
    logits, target = logits.float().log_softmax(dim=-1), target.float().log_softmax(dim=-1)
    return F.kl_div(logits, target, reduction="batchmean", log_target=True)
