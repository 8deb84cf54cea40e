"""Calibration images in the numbers that a measurement asks for, from either fold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from stratavit.batches import unpack
from stratavit.errors import StrataViTError
from stratavit.statistics import folds_of


class Feed:
    """Images of either fold (`statistics.folds_of`) from a loader that is run through again and again."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._batches: Iterator[Any] = iter(loader)
        self._waiting: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._seen, self._sizes = 0, (0, 0)  # images of this pass; in each fold once a pass has ended

    def take(self, count: int, fold: int) -> list[Tensor]:
        """Batches of `count` images of a fold together, or of all that it has; none comes twice.

        Raises:
            StrataViTError: The loader gives no images, or none a second time.
        """
        if self._sizes[fold]:
            count = min(count, self._sizes[fold])
        taken: list[Tensor] = []
        left = count
        while left > 0:
            while not self._waiting[fold]:
                if self._read():
                    continue
                if self._sizes[fold] == 0:  # one image in all
                    fold = 1 - fold
                left = min(left, self._sizes[fold] - (count - left))
                if left <= 0:
                    return taken
            images = self._waiting[fold].pop(0)
            taken.append(images[:left])
            if len(images) > left:
                self._waiting[fold].insert(0, images[left:])
            left -= len(taken[-1])
        return taken

    def _read(self) -> bool:
        """Reads one batch; False if a pass has ended instead."""
        batch = next(self._batches, None)
        if batch is None:
            if self._seen == 0:
                raise StrataViTError(
                    "stratify: the loader gave no images; a generator is used up after one pass, "
                    "give a list or a DataLoader"
                )
            self._sizes = (self._seen + 1) // 2, self._seen // 2
            self._seen, self._batches = 0, iter(self._loader)
            return False
        images = unpack(batch)[0]
        folds = folds_of(self._seen, len(images))
        for fold in (0, 1):
            if (folds == fold).any():
                self._waiting[fold].append(images[folds == fold])
        self._seen += len(images)
        return True
