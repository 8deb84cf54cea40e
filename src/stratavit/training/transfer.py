"""Small tensors on a device without waiting for it: a step that waits leaves a GPU idle."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a copy to CUDA is queued, from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def memberships(index: Tensor, count: int) -> Tensor:
    """1 where an index is, else 0, in float32: ``[...]`` to ``[..., count]``; the index is not looked at.

    `torch.nn.functional.one_hot` reads the smallest and the largest index on most devices.
    """
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()
