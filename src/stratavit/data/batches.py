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
WHOLE = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
OUT_OF_MEMORY_HINT = "try again with fewer workers (--workers) or smaller batches (--batch-size)"


def unpack(batch: Any, said: str = "loader") -> tuple[Tensor, Tensor | None]:
    """Images ``[B, C, H, W]`` and labels ``[B]`` int64 of a batch, tensors or NumPy arrays.

    Args:
        batch: Images, ``(images,)``, ``(images, labels)``, or a mapping: images under ``pixel_values``, ``image`` or
            ``images``, labels under ``labels`` or ``label``; its other keys are not looked at.
        said: Who gave it, for the message.

    Raises:
        StrataViTError: The batch is something else, images are no floats, or labels no whole numbers.
    """
    images, labels = _parts(batch, said)
    fit = images.dim() == 4 and (labels is None or labels.shape == images.shape[:1])
    if not fit:
        shapes = " and ".join(str(tuple(part.shape)) for part in (images, labels) if part is not None)
        advice = "; of one-hot or soft labels take labels.argmax(1)" if labels is not None and labels.dim() == 2 else ""
        raise StrataViTError(f"{said}: expected images [B, 3, H, W] and labels [B], got shapes {shapes}{advice}")
    if not images.dtype.is_floating_point or images.layout != torch.strided:
        raise StrataViTError(
            f"{said}: images are {_type_of(images)}, expected floats; scale them to 0 .. 1 and normalise them as the "
            "model's data_config says"
        )
    if labels is not None:
        if labels.dtype not in WHOLE:
            raise StrataViTError(
                f"{said}: labels are {_type_of(labels)}, expected the number of each image's class as whole numbers; "
                "convert them by labels.long()"
            )
        labels = _free(labels.long())
    return _free(images), labels


def _parts(batch: Any, said: str) -> tuple[Tensor, Tensor | None]:
    """Images and labels as tensors, whatever holds them."""
    if isinstance(batch, Mapping):
        images, labels = _only(batch, IMAGE_KEYS, said), _only(batch, LABEL_KEYS, said)
        if images is None:
            found = ", ".join(sorted(str(key) for key in batch)) or "nothing"
            raise StrataViTError(f"{said}: expected images under {' or '.join(IMAGE_KEYS)}, got a mapping of {found}")
        parts: tuple[Any, ...] = images, labels
    else:
        parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    held = [_tensor(part) for part in parts]
    bare = len(parts) == 2 and parts[1] is None
    if len(parts) not in (1, 2) or held[0] is None or (len(parts) == 2 and not bare and held[1] is None):
        got = type(batch).__name__
        if isinstance(batch, list | tuple | Mapping):
            got += f" of {', '.join(type(part).__name__ for part in parts[:4]) or 'nothing'}"
        raise StrataViTError(
            f"{said}: expected batches of images, (images,) or (images, labels) as tensors, or a mapping of them, "
            f"got {got}"
        )
    return held[0], held[1] if len(held) == 2 else None


def _only(batch: Mapping[Any, Any], names: tuple[str, ...], said: str) -> Any:
    """What a mapping holds under one of these names; None if under none.

    Raises:
        StrataViTError: It holds tensors under several.
    """
    found = {name: batch[name] for name in names if name in batch and batch[name] is not None}
    tensors = {name: value for name, value in found.items() if _tensor(value) is not None}
    if len(tensors) > 1:
        raise StrataViTError(f"{said}: a batch holds {' and '.join(tensors)}; keep one of them")
    return next(iter((tensors or found).values()), None)


def _tensor(part: Any) -> Tensor | None:
    """A tensor or a NumPy array as a tensor; None of anything else."""
    if isinstance(part, Tensor):
        return part
    if not isinstance(part, np.ndarray):
        return None
    try:
        return torch.from_numpy(part.astype(part.dtype.newbyteorder("="), copy=True))
    except TypeError:
        return None


def _type_of(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return layout + str(tensor.dtype).removeprefix("torch.")


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
        model: Any; a timm model, or a `SuperNet`, says what it takes. None: nothing is known.
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
    """Images must be numbers.

    Raises:
        StrataViTError: A value is NaN or infinite.
    """
    if not images.isfinite().all():
        raise StrataViTError(f"{said}: images hold NaN or infinite values; check how they are read and normalised")


def check_images(model: nn.Module, images: Tensor, said: str = "loader") -> None:
    """Images ``[B, C, H, W]`` must be such as the model takes, as far as it is timm's and says so.

    Raises:
        StrataViTError: Other channels, a size that the model does not take, or channels last.
    """
    patches = _patches(model)
    if patches is None:
        return
    takes, (channels, *size) = int(patches.proj.in_channels), images.shape[1:]
    if channels != takes:
        if images.shape[3] == takes:
            raise StrataViTError(
                f"{said}: images of shape {tuple(images.shape)} have their channels last, expected "
                f"[B, {takes}, H, W]; give images.permute(0, 3, 1, 2)"
            )
        raise StrataViTError(
            f"{said}: the images' number of channels is {channels}, the model takes {takes}; convert them"
        )
    wanted = _size_refused(patches, (size[0], size[1]))
    if wanted:
        raise StrataViTError(
            f"{said}: images are {size[0]} x {size[1]}, the model takes {wanted}; prepare them as its data_config "
            "says, or make the model for that size (img_size of timm.create_model)"
        )


def _patches(model: Any) -> Any:
    """The patch embedding, if images reach it as they are: the model and it are timm's own.

    None of a convolutional stem, which does not say what it takes.
    """
    inner = model.model if is_super_network(model) else model
    passes = [getattr(type(inner), name, None) for name in ("forward", "forward_features")]
    if inner._forward_pre_hooks or not all(_of_timm(way) for way in passes):
        return None
    patches = getattr(inner, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or not _of_timm(type(patches)):
        return None
    return None if patches._forward_pre_hooks else patches


def _of_timm(part: Any) -> bool:
    return str(getattr(part, "__module__", "")).startswith("timm.")


def _size_refused(patches: Any, size: tuple[int, int]) -> str | None:
    """What the model takes, in words, if it does not take this size."""
    if patches.img_size is None:
        return None
    height, width = patches.img_size
    if patches.strict_img_size:
        return None if size == (height, width) else f"{height} x {width}"
    if patches.dynamic_img_pad:
        return None
    steps: tuple[int, int] = patches.patch_size
    fits = all(side and side % step == 0 for side, step in zip(size, steps, strict=True))
    return None if fits else f"multiples of {steps[0]} x {steps[1]}"


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
def watched(said: str, less: Callable[[], str] = lambda: OUT_OF_MEMORY_HINT) -> Iterator[None]:
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
        stop = _stop_behind(error)
        if stop is not None:
            raise stop from error
        if out_of_memory(error):
            where = "in a process that reads images" if "DataLoader worker" in str(error) else "on the device or here"
            raise StrataViTError(f"{said}memory ran out {where}; {less()}") from error
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StrataViTError(
            f"{said}a process that reads images was ended from outside, most likely for want of memory; {less()}"
        ) from error


def _stop_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The signal that was being handled when torch noticed that a worker, which got it too, had ended."""
    found = error.__context__
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__context__
    return found


def guarded(batches: Iterable[Any], said: str) -> Iterator[Any]:
    """The same batches, `watched` while they are waited for."""
    iterator, end = iter(batches), object()
    while True:
        with watched(f"{said}: "):
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch
