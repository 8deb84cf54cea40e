"""How far two models agree on the same images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def agreement(found: Tensor, expected: Tensor, classes: bool) -> float:
    """How far two models' outputs ``[B, ...]`` agree, percent.

    Args:
        found, expected: Of the same images.
        classes: They are logits: the share of images with the same first class; otherwise the mean cosine.
    """
    if classes:
        return 100 * int((found.argmax(-1) == expected.argmax(-1)).sum()) / len(found)  # exact: 36 of 40 are 90
    return 100 * float(F.cosine_similarity(found.flatten(1), expected.flatten(1)).mean())
