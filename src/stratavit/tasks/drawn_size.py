"""The size that a training loop's own calls of a super-network run at: set from outside, the loop unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from stratavit.errors import StrataViTError


class DrawnSize:
    """A forward pre-hook of a super-network that names the spec where the call does not.

    It does so only for calls with gradients that the training loop makes itself, that is, with the loop on their stack.
    So evaluation, a teacher's pass, other threads, and whatever runs after a training that ended by an error are at
    full size: neither library says so when it fails between two of its own callbacks. Copies of the network are plain.
    """

    def __init__(self) -> None:
        self.spec: Mapping[str, int] | None = None
        self.loop: FrameType | None = None

    def set(self, spec: Mapping[str, int], libraries: tuple[str, ...]) -> None:
        """Names a spec for the calls of the training loop of one of these libraries, which has called us."""
        self.spec, self.loop = spec, _loop_of(libraries)

    def clear(self) -> None:
        """Calls run as they say themselves."""
        self.spec = self.loop = None

    def __call__(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments of the call, its spec filled in; see `nn.Module.register_forward_pre_hook`."""
        named = args[1] if len(args) > 1 else kwargs.get("spec")
        if self.spec is None or named is not None or not torch.is_grad_enabled() or not self._in_loop():
            return None
        return args[:1], {**kwargs, "spec": self.spec}

    def __reduce__(self) -> tuple[Any, ...]:
        return DrawnSize, ()

    def _in_loop(self) -> bool:
        frame = inspect.currentframe()
        while frame is not None and frame is not self.loop:
            frame = frame.f_back
        return frame is not None


def _loop_of(libraries: tuple[str, ...]) -> FrameType:
    """The frame of the library's function that its user called: the outermost of those in a row that led here."""
    frame, found = inspect.currentframe(), None
    while frame is not None and (found is None or _root(frame) in libraries):
        found = frame if _root(frame) in libraries else None
        frame = frame.f_back
    if found is None:
        raise StrataViTError(f"this callback must be called by a training loop of {' or '.join(libraries)}")
    return found


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
