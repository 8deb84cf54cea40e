"""Which image comes when, and with which augmentation: all of it follows from seed, epoch and place alone.

So a run that is interrupted anywhere goes on exactly as if it had not been, however many worker processes
load images: there is no state of a generator that could be lost.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stratavit.errors import StrataViTError
from stratavit.training.recipe import Recipe
from stratavit.utils.random_streams import stream
from stratavit.utils.signals import hush

Key = tuple[int, int, int]  # epoch, place in the epoch, index of the image


@dataclass(frozen=True)
class Order:
    """The order of images; processes use the places of an epoch in turn.

    Images come round by round, all of them shuffled in each. An epoch is a round, or a part of the sequence of rounds
    that is shorter or longer. With `repeats`, a round holds `images` / `repeats` different images, each with several
    augmentations (repeated augmentation, as in the DeiT recipe).

    Attributes:
        images: Size of the data set.
        count: Places of an epoch.
    """

    images: int
    count: int
    batch_size: int
    processes: int
    accumulate: int
    repeats: int
    seed: int

    @property
    def step_images(self) -> int:
        """Images per step of the optimiser, of all processes."""
        return self.batch_size * self.processes * self.accumulate

    @property
    def steps(self) -> int:
        """Steps of the optimiser per epoch; images that do not fill a step are left out."""
        return self.count // self.step_images

    def indices(self, epoch: int) -> Tensor:
        """Index of the image at every place of an epoch, ``[count]``."""
        first, end = epoch * self.count, (epoch + 1) * self.count
        rounds = range(first // self.images, -(-end // self.images))
        sequence = torch.cat([self._shuffled(number) for number in rounds])
        return sequence[first - rounds.start * self.images :][: self.count]

    def _shuffled(self, number: int) -> Tensor:
        """Index of the image at every place of a round, ``[images]``."""
        generator = torch.Generator().manual_seed(stream(self.seed, "order", number).getrandbits(63))
        order = torch.randperm(self.images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.images]

    def batches(self, epoch: int, process: int, first_step: int = 0) -> list[list[Key]]:
        """Keys of one process's batches in an epoch, from a step on."""
        order, width = self.indices(epoch).tolist(), self.batch_size * self.processes
        return [
            [(epoch, place, order[place]) for place in range(start, start + width, self.processes)]
            for start in range(first_step * self.step_images + process, self.steps * self.step_images + process, width)
        ]


def make_order(data: Dataset[Any], recipe: Recipe, processes: int, count: int | None = None) -> Order:
    """The order that a recipe prescribes for a data set, `count` images per epoch, or all; too few are refused."""
    images = length_of(data)
    order = Order(images, count or images, recipe.batch_size, processes, recipe.accumulate, recipe.repeats, recipe.seed)
    if order.steps == 0:
        raise StrataViTError(
            f"train: {order.count} images are fewer than the {order.step_images} of one step; lower batch_size or "
            "accumulate"
        )
    if recipe.growths > order.steps:
        raise StrataViTError(f"train: growths ({recipe.growths}) must not exceed the {order.steps} steps of an epoch")
    return order


def length_of(data: Any) -> int:
    """Number of images of a data set; a loader, or what cannot be indexed, is refused."""
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise StrataViTError(
            "train: expected a data set of known length that returns every image by its number, got "
            f"{type(data).__name__}" + ("; give its dataset" if isinstance(data, DataLoader) else "")
        )
    return len(data)


class Seeded(Dataset[Any]):
    """A data set read by `Key`: every generator is seeded by seed, epoch and place before an image is augmented."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, place, index = key
        seed_all(self.seed, "image", epoch, place)
        return self.dataset[index]


def loader(
    dataset: Dataset[Any], order: Order, epoch: int, process: int, first_step: int, workers: int, pin: bool
) -> DataLoader[Any]:
    """Batches of one process in an epoch, from a step on; at most one worker per core."""
    return DataLoader(
        Seeded(dataset, order.seed),
        batch_sampler=order.batches(epoch, process, first_step),
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """A scheduler's SIGTERM to all processes must not take the images from a run that is about to save its state."""
    hush()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def close(batches: Iterator[Any]) -> None:
    """Ends the workers of a loader that is iterated over; as they ignore signals, they must not wait for one."""
    shut = getattr(batches, "_shutdown_workers", None)
    if shut is not None:
        shut()


def seed_all(*numbers: int | str) -> None:
    """Seeds Python's, NumPy's and torch's generators by these numbers alone."""
    value = stream(*numbers).getrandbits(63)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Runs the body and puts the generators of Python, NumPy and torch back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
