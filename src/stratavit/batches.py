"""What a loader may yield, and what its labels must be."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stratavit.errors import StrataViTError


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
