"""What a loader may yield, and what its labels must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stratavit.errors import StrataViTError, out_of_memory

LESS = "try again with fewer workers (--workers) or smaller batches (--batch-size)"


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch: a tensor, ``(images,)`` or ``(images, labels)``.

    Raises:
        StrataViTError: The batch is something else.
    """
    parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, list | tuple) else ()
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        raise StrataViTError(
            f"loader: expected batches of images, (images,) or (images, labels) tensors, got {type(batch).__name__}"
        )
    images = parts[0]
    labels = parts[1] if len(parts) == 2 else None
    if images.dim() != 4 or (labels is not None and labels.shape != images.shape[:1]):
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise StrataViTError(f"loader: expected images [B, 3, H, W] and labels [B], got shapes {shapes}")
    return images, labels


def check_labels(labels: Tensor, classes: int) -> None:
    """Labels must index the head's classes.

    Raises:
        StrataViTError: A label is outside ``0 .. classes - 1``.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise StrataViTError(
            f"labels: found {low if low < 0 else high}, but the model's head has {classes} classes "
            f"(0 to {classes - 1}); give a class map or a model with the right head"
        )


@contextmanager
def watched(said: str, less: Callable[[], str] = lambda: LESS) -> Iterator[None]:
    """Tells in one sentence what goes wrong in a loader's worker processes, or for want of memory.

    Torch tells what a worker died of wherever the program stands.

    Args:
        said: Who reads, and a colon, for the message; or nothing.
        less: Says what to do for want of memory.

    Raises:
        StrataViTError: A worker was ended from outside, or said so itself; or memory ran out.
    """
    try:
        yield
    except StrataViTError as error:
        if "\n" not in str(error):
            raise
        # torch puts the worker's traceback into it
        raise StrataViTError(str(error).rsplit("StrataViTError: ", 1)[-1].strip()) from error
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            where = "in a process that reads images" if "DataLoader worker" in str(error) else "on the device or here"
            raise StrataViTError(f"{said}memory ran out {where}; {less()}") from error
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StrataViTError(
            f"{said}a process that reads images was ended from outside, most likely for want of memory; {less()}"
        ) from error


def guarded(batches: Iterable[Any], said: str) -> Iterator[Any]:
    """The same batches, `watched` while they are waited for."""
    iterator, end = iter(batches), object()
    while True:
        with watched(f"{said}: "):
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch
