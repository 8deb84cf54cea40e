"""Which device to run on, and how not to wait for it: a GPU that is waited for is idle."""

from __future__ import annotations

import torch
from torch import Tensor

from stratavit.errors import StrataViTError


def pick_device(name: str) -> torch.device:
    """The named device, or the best there is for ``auto``.

    Raises:
        StrataViTError: The device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise StrataViTError(f"device {name!r} is not available here; use --device cpu or leave it out") from error
    return device


def queues_work(device: torch.device) -> bool:
    """Whether a device queues calls, so that a call costs time of its own, and reading a number waits: not a CPU."""
    return device.type != "cpu"


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, of a type if one is named; a copy from the CPU to CUDA is queued, from pinned memory."""
    queued = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if queued else tensor).to(device, dtype or tensor.dtype, non_blocking=queued)


def memberships(index: Tensor, count: int) -> Tensor:
    """1 where an index is, else 0, in float32: ``[...]`` to ``[..., count]``; the index is not looked at.

    `torch.nn.functional.one_hot` reads the smallest and the largest index on most devices.
    """
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()
