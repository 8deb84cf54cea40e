"""Calibration images in the numbers that a measurement asks for, from either fold, whatever the loader's order."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.data.batches import batches_of
from stratavit.data.pixels import folds_of, keys_of
from stratavit.errors import StrataViTError

LIMIT_BYTES = 640 * 2**20  # of images held, both folds: over 1,100 of 224 x 224 in float32

Rank = tuple[int, int]  # an image's key, and how many of the same key came before it in a pass


class Fold:
    """The images of one fold in the order of their ranks, as many at a time as there is room for.

    Attributes:
        size: Images of the fold in the last pass.
    """

    def __init__(self) -> None:
        self.size = 0
        self._held: list[tuple[Rank, Tensor]] = []
        self._next = 0  # of those held
        self._after: Rank | None = None  # those held come behind this one; None: they are the first
        self._more = False  # others come behind those held
        self._heap: list[tuple[int, int, Tensor]] = []  # while a pass runs: ranks below 0, the largest first
        self._counts: Counter[int] = Counter()  # of the keys on the heap, and of those that were left out in front

    @property
    def whole(self) -> bool:
        """Whether all images of the fold are held."""
        return bool(self.size) and self._after is None and not self._more

    @property
    def used_up(self) -> bool:
        """Whether none of those held is left, and the loader must be read."""
        return self._next == len(self._held) and not (self.whole and self._held)

    def next(self) -> Tensor:
        """The next image; behind the last one comes the first."""
        self._next = self._next % len(self._held) + 1
        return self._held[self._next - 1][1]

    def begin(self) -> None:
        """A pass begins: what was held is let go, and looked for from the first image that was not served."""
        if self._next == len(self._held) and not self._more:
            self._after = None
        elif self._next:
            self._after = self._held[self._next - 1][0]
        self.size, self._held, self._next, self._more = 0, [], 0, False

    def offer(self, key: int, image: Tensor, room: int) -> None:
        """Takes an image of the pass, if it is among the first `room`."""
        self.size += 1
        rank = (key, self._counts[key])
        if self._after is not None and rank <= self._after:
            if key == self._after[0]:
                self._counts[key] += 1
            return
        if len(self._heap) >= room and rank > _rank(self._heap[0]):
            self._more = True
            return
        self._counts[key] += 1
        heapq.heappush(self._heap, (-key, -rank[1], image.clone()))
        while len(self._heap) > room:
            self._more = True
            self._counts[-heapq.heappop(self._heap)[0]] -= 1

    def end(self) -> None:
        """The pass has ended."""
        self._held = [(_rank(entry), entry[2]) for entry in sorted(self._heap, key=_rank)]
        self._heap, self._counts = [], Counter()


def _rank(entry: tuple[int, int, Tensor]) -> Rank:
    return -entry[0], -entry[1]


class Feed:
    """Images of either fold (`pixels.folds_of`) from a loader, in an order that their pixels give.

    However the loader orders them, and into whatever batches, the same takes give the same images. As many
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

    def take(self, count: int, fold: int) -> list[Tensor]:
        """Batches of `count` images of a fold together, or of all that it has; none comes twice.

        If the fold has none they are of the other one.

        Raises:
            StrataViTError: The loader gives no images, or none a second time.
        """
        if not any(one.size for one in self._folds):
            self._read(count)
        taken: list[Tensor] = []
        while len(taken) < min(count, self._source(fold).size):
            if self._source(fold).used_up:
                self._read(count)
            else:
                taken.append(self._source(fold).next())
        return self._batches(taken)

    def _source(self, fold: int) -> Fold:
        return self._folds[fold] if self._folds[fold].size else self._folds[1 - fold]

    def _batches(self, images: list[Tensor]) -> list[Tensor]:
        """Images ``[C, H, W]`` as batches of those alike in shape and type."""
        groups: dict[Any, list[Tensor]] = {}
        for image in images:
            groups.setdefault((image.shape, image.dtype), []).append(image)
        return [torch.stack(part) for group in groups.values() for part in _split(group, self._batch)]

    def _read(self, count: int) -> None:
        """Runs through the loader and holds what comes next in the folds, at least `count` images of either."""
        folds = {number: fold for number, fold in enumerate(self._folds) if not fold.whole}
        for fold in folds.values():
            fold.begin()
        images_seen, largest = 0, 1  # bytes of an image
        for images in self._images():
            largest = max(largest, images[0].nbytes)
            room = max(count, self._limit // (2 * largest))  # does not grow within a pass
            keys = keys_of(images)
            for key, number, image in zip(keys, folds_of(keys).tolist(), images, strict=True):
                if number in folds:
                    folds[number].offer(int.from_bytes(key, "big"), image, room)
            images_seen += len(images)
            self._batch = max(self._batch, len(images))
        for fold in folds.values():
            fold.end()
        if not images_seen:
            raise StrataViTError(
                "stratify: the loader gave no images; a generator is used up after one pass, "
                "give a list or a DataLoader"
            )

    def _images(self) -> Iterator[Tensor]:
        for images, _ in batches_of(self._loader, self._model):
            yield images.cpu()


def _split(items: list[Tensor], size: int) -> list[list[Tensor]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
