"""How far two models agree on the same images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def agreement(found: Tensor, expected: Tensor, classes: bool) -> float:
    """How far two models' outputs agree, percent: the mean of `agreements`."""
    return 100 * float(agreements(found, expected, classes).sum()) / len(found)  # exact: 36 of 40 are 90


def agreements(found: Tensor, expected: Tensor, classes: bool) -> Tensor:
    """How far two models' outputs agree on each image, at most 1: ``[B]`` float64.

    Args:
        found, expected: Of the same images: logits ``[B, classes]``, features ``[B, D]``, or maps ``[B, N, C]`` or
            ``[B, H, W, C]``.
        classes: They are logits: 1 where the first class is the same, else 0. Otherwise the cosine of features, or the
            mean cosine of an image's tokens.
    """
    if classes:
        return (found.argmax(-1) == expected.argmax(-1)).double()
    return F.cosine_similarity(found, expected, dim=-1).reshape(len(found), -1).double().mean(dim=1)
