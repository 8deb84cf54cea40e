"""Calibration images in the numbers that a measurement asks for, from either fold, whatever the loader's order."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from stratavit.data.batches import batches_of
from stratavit.data.pixels import KEY_BYTES, Keyed, folds_of, keys_of
from stratavit.errors import StrataViTError

LIMIT_BYTES = 640 * 2**20  # of images held, both folds: over 1,100 of 224 x 224 in float32


class Fold:
    """The images of one fold in the order of their keys, as many different ones at a time as there is room for.

    Attributes:
        size: Images of the fold in the last pass.
    """

    def __init__(self) -> None:
        self.size = 0
        self._held: list[tuple[int, Tensor]] = []  # copies of an image follow each other
        self._next = 0  # of those held
        self._start = 0  # the smallest key that may be held
        self._served = 0  # of the images of that key
        self._more = False  # there are larger keys than those held
        self._copies: dict[int, list[Tensor]] = {}  # while a pass runs: key -> one image, as often as it came
        self._largest: list[int] = []  # a heap of the keys, negated

    @property
    def complete(self) -> bool:
        """Whether all images of the fold are held."""
        return bool(self.size) and self._start == 0 and not self._more

    @property
    def used_up(self) -> bool:
        """Whether none of those held remains, and the loader must be read."""
        return self._next == len(self._held) and not (self.complete and self._held)

    def next(self) -> tuple[int, Tensor]:
        """The next image and its key; after the last one comes the first."""
        self._next = self._next % len(self._held) + 1
        return self._held[self._next - 1]

    def begin(self) -> None:
        """Begins a pass, which looks for the images after those served."""
        if self._next == len(self._held) and not self._more:
            self._start = self._served = 0
        elif self._next:
            last = self._held[self._next - 1][0]
            remain = any(key == last for key, _ in self._held[self._next :])
            self._start = last if remain else last + 1
            self._served = sum(key == last for key, _ in self._held[: self._next]) if remain else 0
        self.size, self._held, self._next, self._more = 0, [], 0, False

    def offer(self, key: int, image: Tensor, room: int) -> None:
        """Holds an image of the pass, if its key is among the first `room`."""
        self.size += 1
        if key in self._copies:
            self._copies[key].append(self._copies[key][0])
        elif key >= self._start:
            if len(self._copies) < room:
                heapq.heappush(self._largest, -key)
            else:
                self._more = True
                if key > -self._largest[0]:
                    return
                del self._copies[-heapq.heapreplace(self._largest, -key)]
            self._copies[key] = [image.clone()]

    def end(self) -> None:
        """Ends the pass."""
        self._held = [(key, image) for key in sorted(self._copies) for image in self._copies[key]]
        self._next = min(self._served, len(self._copies.get(self._start, ())))
        self._copies, self._largest = {}, []


class Feed:
    """Images of either fold (`pixels.folds_of`) from a loader, in an order that follows from their pixels.

    The same takes return the same images, however the loader orders and batches them. As many
    are held as `limit` allows, those next in order; the loader is run through again when these are used up.

    Args:
        loader: See `batches.unpack`; labels are not used.
        model: What the images are for, if they are to be checked.
        limit: Bytes of images to hold at most; one take's images are held in any case.
    """

    def __init__(self, loader: Iterable[Any], model: nn.Module | None = None, limit: int = LIMIT_BYTES) -> None:
        self._loader, self._model, self._limit = loader, model, limit
        self._folds = Fold(), Fold()
        self._batch = 1  # images of the loader's largest batch

    def count(self, least: int) -> int:
        """Images that the loader yields; it is run through once for that, and at least so many of a fold are held."""
        if not any(one.size for one in self._folds):
            self._read(least)
        return sum(one.size for one in self._folds)

    def take(self, count: int, fold: int) -> list[Keyed]:
        """Batches of `count` images of a fold together, or of all that it has; none comes twice.

        If the fold has none they are of the other one.

        Raises:
            StrataViTError: The loader yields no images, or none a second time.
        """
        if not any(one.size for one in self._folds):
            self._read(count)
        taken: list[tuple[int, Tensor]] = []
        while len(taken) < min(count, self._source(fold).size):
            if self._source(fold).used_up:
                self._read(count)
            else:
                taken.append(self._source(fold).next())
        return self._batches(taken)

    def _source(self, fold: int) -> Fold:
        return self._folds[fold] if self._folds[fold].size else self._folds[1 - fold]

    def _batches(self, taken: list[tuple[int, Tensor]]) -> list[Keyed]:
        """Keys and images as batches of those alike in shape and type."""
        groups: dict[Any, list[tuple[int, Tensor]]] = {}
        for key, image in taken:
            groups.setdefault((image.shape, image.dtype), []).append((key, image))
        batches = []
        for group in groups.values():
            for start in range(0, len(group), self._batch):
                keys, images = zip(*group[start : start + self._batch], strict=True)
                batches.append(Keyed(images, [key.to_bytes(KEY_BYTES, "big") for key in keys]))
        return batches

    def _read(self, count: int) -> None:
        """Runs through the loader and holds what comes next in the folds, at least `count` images of either."""
        folds = {number: fold for number, fold in enumerate(self._folds) if not fold.complete}
        for fold in folds.values():
            fold.begin()
        largest = 0  # bytes of an image
        for images, _ in batches_of(self._loader, self._model):
            images = images.cpu()
            largest = max(largest, images[0].nbytes)
            room = max(count, self._limit // (2 * largest))  # does not grow within a pass
            keys = keys_of(images)
            for key, number, image in zip(keys, folds_of(keys).tolist(), images, strict=True):
                if number in folds:
                    folds[number].offer(int.from_bytes(key, "big"), image, room)
            self._batch = max(self._batch, len(images))
        for fold in folds.values():
            fold.end()
        if not largest:
            raise StrataViTError(
                "stratify: the loader gave no images; a generator is used up after one pass, "
                "give a list or a DataLoader"
            )
