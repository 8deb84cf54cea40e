"""Which device to run on."""

from __future__ import annotations

import torch

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
