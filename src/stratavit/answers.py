"""The dense model's answers to images, remembered: the same images come again and again while a list is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LIMIT_BYTES = 64 * 2**20  # memory does not grow with the number of images beyond it

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]


class Answers:
    """Logits and pooled features of images that were seen, found by their pixels, in whatever order they come.

    Valid as long as the weights of the model stay as they were; changes around autograd's version counter
    (``weight.data``) are not seen.

    Args:
        limit: Bytes to hold at most; what comes after that is computed each time.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._room = limit
        self._weights: Any = None

    def __len__(self) -> int:
        return len(self._known)

    def seal(self, model: nn.Module) -> None:
        """Takes a model's weights as those that the answers belong to."""
        self._weights = _version(model)

    def belong_to(self, model: nn.Module) -> bool:
        """Whether the weights are still those of `seal`."""
        return self._weights == _version(model)

    def add(self, images: Tensor, logits: Tensor, features: Tensor) -> None:
        """Remembers answers: images ``[B, 3, H, W]``, logits ``[B, classes]``, features ``[B, C]``."""
        for key, row in zip(_keys(images), _rows(logits, features), strict=True):
            self._remember(key, row)

    def of(self, images: Tensor, compute: Pass) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and features ``[B, C]`` of images; `compute` is asked for those not known."""
        keys = _keys(images)
        unknown = [number for number, key in enumerate(keys) if key not in self._known]
        fresh: dict[bytes, tuple[Tensor, Tensor]] = {}
        if unknown:
            found = compute(images[unknown])
            for number, row in zip(unknown, _rows(*found), strict=True):
                fresh[keys[number]] = row
                self._remember(keys[number], row)
        rows = [fresh[key] if key in fresh else self._known[key] for key in keys]
        logits, features = (torch.stack(side).to(images.device) for side in zip(*rows, strict=True))
        return logits, features

    def _remember(self, key: bytes, row: tuple[Tensor, Tensor]) -> None:
        size = sum(part.nbytes for part in row)
        if key not in self._known and size <= self._room:
            self._known[key] = row
            self._room -= size


def _keys(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images.float().cpu()]


def _rows(logits: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    sides = (side.detach().float().cpu().clone() for side in (logits, features))
    return list(zip(*sides, strict=True))


def _version(model: nn.Module) -> list[tuple[int, int]]:
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
