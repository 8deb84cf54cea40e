"""How far the answers of a small network are from those of a large one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distance(small: Tensor, dense: Tensor, classes: int) -> Tensor:
    """KL(dense || small) of logits ``[B, classes]``, summed; without a head the relative squared distance."""
    small, dense = small.float(), dense.float()
    if classes:
        return F.kl_div(small.log_softmax(dim=-1), dense.log_softmax(dim=-1), reduction="sum", log_target=True)
    return ((small - dense).square().sum(dim=-1) / dense.square().sum(dim=-1).clamp_min(1e-12)).sum()
