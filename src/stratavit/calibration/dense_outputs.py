"""The dense model's outputs for images, remembered: the same images come again and again while a list is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from stratavit.data.pixels import Seen
from stratavit.utils.digest import digest_of

LIMIT_BYTES = 64 * 2**20  # memory does not grow with the number of images beyond it


class DenseOutputs:
    """Outputs and pooled features of images, found by their pixels, in whatever order the images come.

    Valid as long as the weights of the model stay as they were.

    Args:
        limit: Bytes to hold at most; what comes after that is computed each time.

    Attributes:
        seen: All images that were added, also those whose outputs found no room.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.seen = Seen()
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._room = limit
        self._weights: bytes | None = None

    def seal(self, model: nn.Module) -> None:
        """Remembers a model's weights as those that the outputs belong to."""
        self._weights = _weights_digest(model)

    def belong_to(self, model: nn.Module) -> bool:
        """Whether the weights are still those of `seal`."""
        return self._weights == _weights_digest(model)

    def add(self, keys: Sequence[bytes], logits: Tensor, features: Tensor) -> None:
        """Remembers for images: their keys (`keys_of`), logits ``[B, classes]`` or maps, features ``[B, C]``."""
        self.seen.add(keys)
        self._remember(keys, logits, features)

    def of(
        self, keys: Sequence[bytes], images: Tensor, compute: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` or maps, and features ``[B, C]``, of images; `compute` runs on those not known."""
        rows = {key: self._known[key] for key in keys if key in self._known}
        unknown = [number for number, key in enumerate(keys) if key not in rows]
        if unknown:
            rows |= self._remember([keys[number] for number in unknown], *compute(images[unknown]))
        found = zip(*(rows[key] for key in keys), strict=True)
        logits, features = (_together(side, images.device) for side in found)
        return logits, features

    def _remember(self, keys: Sequence[bytes], *sides: Tensor) -> dict[bytes, tuple[Tensor, Tensor]]:
        """All of the outputs by key, where they are: a GPU is not waited for; those that find room are kept."""
        logits, features = (side.detach().float() for side in sides)
        rows = dict(zip(keys, zip(logits, features, strict=True), strict=True))
        for key, row in rows.items():
            size = sum(part.nbytes for part in row)
            if key not in self._known and size <= self._room:
                self._known[key] = row[0].clone(), row[1].clone()  # a view would keep its batch, and maps are large
                self._room -= size
        return rows


def _together(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows as one tensor on a device; in one copy, unless some are there and others are not."""
    alike = len({row.device for row in rows}) == 1
    return torch.stack(list(rows) if alike else [row.to(device) for row in rows]).to(device)


def outputs_of(model: nn.Module, known: DenseOutputs | None) -> DenseOutputs | None:
    """What is known of a model's outputs; None if that is nothing, or if its weights have changed since."""
    return known if known is not None and known.belong_to(model) else None


def _weights_digest(model: nn.Module) -> bytes:
    """A hash of all parameters and buffers of a model, however they were changed."""
    return digest_of(chain(model.named_parameters(), model.named_buffers()))
