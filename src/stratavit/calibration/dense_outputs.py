"""The dense model's answers to images, remembered: the same images come again and again while a list is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from stratavit.data.pixels import Seen, keys_of
from stratavit.utils.digest import digest_of

LIMIT_BYTES = 64 * 2**20  # memory does not grow with the number of images beyond it

ForwardPass = Callable[[Tensor], tuple[Tensor, Tensor]]


class DenseOutputs:
    """Logits and pooled features of images that were seen, found by their pixels, in whatever order they come.

    Valid as long as the weights of the model stay as they were.

    Args:
        limit: Bytes to hold at most; what comes after that is computed each time.

    Attributes:
        seen: All images that were added, also those whose answers found no room.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.seen = Seen()
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._room = limit
        self._weights: bytes | None = None

    def __len__(self) -> int:
        return len(self._known)

    def seal(self, model: nn.Module) -> None:
        """Takes a model's weights as those that the answers belong to."""
        self._weights = weights_digest(model)

    def belong_to(self, model: nn.Module) -> bool:
        """Whether the weights are still those of `seal`."""
        return self._weights == weights_digest(model)

    def add(self, keys: Sequence[bytes], logits: Tensor, features: Tensor) -> None:
        """Remembers answers to images: their keys (`keys_of`), logits ``[B, classes]``, features ``[B, C]``."""
        self.seen.add(keys)
        for key, row in zip(keys, _rows(logits, features), strict=True):
            self._remember(key, row)

    def of(self, images: Tensor, compute: ForwardPass) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and features ``[B, C]`` of images; `compute` is asked for those not known."""
        keys = keys_of(images)
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


def weights_digest(model: nn.Module) -> bytes:
    """A hash of all parameters and buffers of a model, however they were changed."""
    return digest_of(chain(model.named_parameters(), model.named_buffers()))


def _rows(logits: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    sides = (side.detach().float().cpu().clone() for side in (logits, features))
    return list(zip(*sides, strict=True))
