"""What a loader may yield, and what its labels must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from stratavit.errors import StrataViTError, out_of_memory
from stratavit.utils.model import is_super_network

IMAGE_KEYS = ("pixel_values", "image", "images")
LABEL_KEYS = ("labels", "label")
OUT_OF_MEMORY_HINT = "try again with fewer workers (--workers) or smaller batches (--batch-size)"


def unpack(batch: Any, said: str = "loader") -> tuple[Tensor, Tensor | None]:
    """Images ``[B, C, H, W]`` and labels ``[B]`` int64 of a batch, detached; None in place of labels that it lacks.

    Args:
        batch: Images, ``(images,)``, ``(images, labels)``, or a mapping: images under ``pixel_values``, ``image`` or
            ``images``, labels under ``labels`` or ``label``. They are tensors or NumPy arrays.
        said: What yielded it, for the message.

    Raises:
        StrataViTError: The batch is something else, images are not floats, or labels not integers.
    """
    images, labels = _parts(batch, said)
    if images.dim() != 4 or (labels is not None and labels.shape != images.shape[:1]):
        shapes = " and ".join(str(tuple(part.shape)) for part in (images, labels) if part is not None)
        advice = "; of one-hot or soft labels take labels.argmax(1)" if labels is not None and labels.dim() == 2 else ""
        raise StrataViTError(f"{said}: expected images [B, 3, H, W] and labels [B], got shapes {shapes}{advice}")
    if not images.is_floating_point():
        raise StrataViTError(
            f"{said}: images are {images.dtype}, expected floats; scale them to 0 .. 1 and normalise them as the "
            "model's data_config says"
        )
    if labels is not None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise StrataViTError(
                f"{said}: labels are {labels.dtype}, expected the number of each image's class as integers; "
                "convert them by labels.long()"
            )
        labels = _free(labels.long())
    return _free(images), labels


def _parts(batch: Any, said: str) -> tuple[Tensor, Tensor | None]:
    """Images and labels as tensors, whatever holds them."""
    if isinstance(batch, Mapping):
        parts: tuple[Any, ...] = _only(batch, IMAGE_KEYS, said), _only(batch, LABEL_KEYS, said)
    else:
        parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    images, labels = [*map(_tensor, parts), None, None][:2]
    if len(parts) <= 2 and images is not None and (labels is not None or len(parts) == 1 or parts[1] is None):
        return images, labels
    got, kinds = type(batch).__name__, [type(part).__name__ for part in parts]
    if isinstance(batch, Mapping):
        got, kinds = "a mapping", [f"{key} ({type(part).__name__})" for key, part in batch.items()]
    if isinstance(batch, Mapping | list | tuple):
        got += f" of {', '.join(kinds[:4]) or 'nothing'}"
    raise StrataViTError(
        f"{said}: expected batches of images, (images,) or (images, labels) as tensors, or a mapping with images under "
        f"{' or '.join(IMAGE_KEYS)} and labels under {' or '.join(LABEL_KEYS)}, got {got}"
    )


def _only(batch: Mapping[Any, Any], names: tuple[str, ...], said: str) -> Any:
    """What a mapping holds under one of these names, a tensor if there is one; refused if there are several."""
    found = {name: batch[name] for name in names if batch.get(name) is not None}
    tensors = {name: value for name, value in found.items() if _tensor(value) is not None}
    if len(tensors) > 1:
        raise StrataViTError(f"{said}: a batch holds {' and '.join(tensors)}; keep one of them")
    return next(iter((tensors or found).values()), None)


def _tensor(part: Any) -> Tensor | None:
    """A tensor or a NumPy array as a tensor; None of anything else."""
    if not isinstance(part, np.ndarray):
        return part if isinstance(part, Tensor) else None
    try:
        return torch.from_numpy(part.astype(part.dtype.newbyteorder("=")))
    except TypeError:
        return None


def _free(tensor: Tensor) -> Tensor:
    """Without a graph, and free to take part in one: what was made in inference mode is copied."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def batches_of(
    loader: Iterable[Any], model: nn.Module | None, finite: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels of a loader's batches, checked against the model; batches without images are left out.

    Args:
        loader: See `unpack`.
        model: See `check_images`; None to check nothing.
        finite: Look for NaN and infinite values, too.

    Raises:
        StrataViTError: See `unpack`, `check_images` and `check_finite`.
    """
    for batch in loader:
        images, labels = unpack(batch)
        if not len(images):
            continue
        if model is not None:
            check_images(model, images)
        if finite:
            check_finite(images)
        yield images, labels


def check_finite(images: Tensor, said: str = "loader") -> None:
    """Checks that no image holds NaN or infinite values.

    Raises:
        StrataViTError: One does.
    """
    if not images.isfinite().all():
        raise StrataViTError(f"{said}: images hold NaN or infinite values; check how they are read and normalised")


def check_images(model: nn.Module, images: Tensor, said: str = "loader") -> None:
    """Checks that a model takes images ``[B, C, H, W]``, as far as it is timm's, or a `SuperNet`, and says so.

    Raises:
        StrataViTError: Other channels, a size that the model does not take, or channels last.
    """
    patches = _patches(model)
    if patches is None:
        return
    takes, (channels, height, width) = int(patches.proj.in_channels), images.shape[1:]
    if channels != takes and width == takes:
        raise StrataViTError(
            f"{said}: images of shape {tuple(images.shape)} have their channels last, expected "
            f"[B, {takes}, H, W]; give images.permute(0, 3, 1, 2)"
        )
    if channels != takes:
        raise StrataViTError(
            f"{said}: the images' number of channels is {channels}, the model takes {takes}; convert them"
        )
    wanted = _size_refused(patches, (height, width))
    if wanted:
        raise StrataViTError(
            f"{said}: images are {height} x {width}, the model takes {wanted}; prepare them as its data_config "
            "says, or make the model for that size (img_size of timm.create_model)"
        )


def _patches(model: Any) -> Any:
    """The patch embedding, if it is timm's, without a convolutional stem, and images reach it as they are."""
    inner = model.model if is_super_network(model) else model
    patches = getattr(inner, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or inner._forward_pre_hooks or patches._forward_pre_hooks:
        return None
    passes = (type(inner).forward, getattr(type(inner), "forward_features", None), type(patches))
    return patches if all(str(getattr(part, "__module__", "")).startswith("timm.") for part in passes) else None


def _size_refused(patches: Any, size: tuple[int, int]) -> str | None:
    """What the model takes, in words, if it does not take this size."""
    if patches.img_size is None:
        return None
    height, width = patches.img_size
    if patches.strict_img_size:
        return None if size == (height, width) else f"{height} x {width}"
    steps = patches.patch_size
    fits = all(side and side % step == 0 for side, step in zip(size, steps, strict=True))
    return None if fits or patches.dynamic_img_pad else f"multiples of {steps[0]} x {steps[1]}"


def check_labels(labels: Tensor, classes: int) -> None:
    """Checks that labels are classes of the head.

    Raises:
        StrataViTError: A label is outside ``0 .. classes - 1``.
    """
    numbers = labels.tolist()  # one wait for a device, none for labels as a loader yields them
    low, high = min(numbers), max(numbers)
    if low < 0 or high >= classes:
        raise StrataViTError(
            f"labels: found {low if low < 0 else high}, but the model's head has {classes} classes "
            f"(0 to {classes - 1}); give a class map or a model with the right head"
        )


@contextmanager
def watched(said: str, less: Callable[[], str] = lambda: OUT_OF_MEMORY_HINT) -> Iterator[None]:
    """Reports in one sentence what goes wrong in a loader's worker processes, or that memory ran out.

    Torch raises what a worker died of wherever the program stands.

    Args:
        said: Who reads, and a colon, for the message; or nothing.
        less: Says what to do if memory ran out.

    Raises:
        StrataViTError: A worker was ended from outside, or raised one itself; or memory ran out.
    """
    try:
        yield
    except StrataViTError as error:
        if "\n" not in str(error):
            raise
        # torch puts the worker's traceback into it
        raise StrataViTError(str(error).rsplit("StrataViTError: ", 1)[-1].strip()) from error
    except (MemoryError, RuntimeError, OSError) as error:
        before = error.__context__
        while before is not None and not isinstance(before, KeyboardInterrupt):
            before = before.__context__
        if before is not None:  # the worker got the signal that was being handled, too, and torch noticed its end
            raise before from error
        if out_of_memory(error):
            where = "in a process that reads images" if "DataLoader worker" in str(error) else "on the device or here"
            raise StrataViTError(f"{said}memory ran out {where}; {less()}") from error
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StrataViTError(
            f"{said}a process that reads images was ended from outside, most likely because memory ran out; {less()}"
        ) from error
