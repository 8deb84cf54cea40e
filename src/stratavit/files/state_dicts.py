"""Loads a state dict into a model, strictly, with a sentence for what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stratavit.errors import ArtifactError, StrataViTError, one_line, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEADS = ("head.", "head_dist.", "heads.", "classifier.", "fc.")
SAME = "is this checkpoint of the same architecture?"
ALIGNMENT = 64  # bytes, of every tensor that torch allocates
Shape = tuple[int, ...]


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Loads a state dict strictly.

    Args:
        model: Is changed.
        tensors: Its state dict.
        source: What error messages call it.
        assign: The model gets these tensors, else copies. Tensors of a file start wherever the one before them ends,
            and kernels round differently there: only what starts as torch's own tensors do is not copied.

    Raises:
        ArtifactError: A tensor is missing, unknown, of the wrong shape or type, or not finite; the first one is named.
    """
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    for name, expected in sorted(model.state_dict().items()):
        tensor = tensors[name]
        fits = tensor.dtype in FLOATS if expected.is_floating_point() else tensor.dtype == expected.dtype
        if not fits or not _dense(tensor):
            raise ArtifactError(
                f"{source}: {name} is of type {_kind(tensor)}, the model expects {_kind(expected)}; give dense numbers"
            )
        if not tensor.isfinite().all():
            raise ArtifactError(f"{source}: {name} holds NaN or infinite values; give a sound checkpoint")
    loaded = {name: aligned(tensor) for name, tensor in tensors.items()} if assign else dict(tensors)
    model.load_state_dict(loaded, strict=True, assign=assign)
    model.requires_grad_(True)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it starts at an address as torch allocates them."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def align_weights(model: nn.Module) -> None:
    """Copies the weights and buffers of a model that do not start as torch's own tensors do, see `load_weights`."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = aligned(tensor.data)


def check_dense(name: str, tensor: Tensor, source: str) -> None:
    """Checks that all numbers of a tensor are there, so that work on it costs no more than the file is large.

    Raises:
        ArtifactError: It is sparse, quantized, without storage, or repeats fewer numbers than it should have.
    """
    if not _dense(tensor) or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise ArtifactError(f"{source}: {shown(name)} {shape} is of type {_kind(tensor)}, not {shape} dense numbers")


def check_fit(model: nn.Module, shapes: Mapping[str, Shape], source: str) -> None:
    """Compares names and shapes of tensors with those of a model, which may be without storage.

    Raises:
        ArtifactError: A tensor is missing, unknown or of the wrong shape; the first one is named.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | shapes.keys()):
        head = name.startswith(HEADS)
        if name not in shapes:
            hint = "give one with a head, or ask for none (num_classes=0)" if head else SAME
            raise ArtifactError(f"{source}: {name} is missing; {hint}")
        if name not in expected:
            hint = "set --num-classes to the checkpoint's" if head else SAME
            raise ArtifactError(f"{source}: {shown(name)} is not part of the model; {hint}")
        ours, theirs = tuple(expected[name].shape), shapes[name]
        if ours != theirs:
            hint = "; set --num-classes to the checkpoint's" if head else ""
            raise ArtifactError(f"{source}: {name} has shape {theirs}, the model expects {ours}{hint}")


@contextmanager
def unreachable(name: str) -> Iterator[None]:
    """Turns any error of a download into one sentence with the way out.

    Raises:
        StrataViTError: Pretrained weights cannot be fetched.
    """
    try:
        yield
    except Exception as error:  # each hub's client has errors of its own
        raise StrataViTError(
            f"cannot fetch pretrained weights of {name}: {one_line(error)}; give a local checkpoint with --weights FILE"
        ) from error


def _dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _kind(tensor: Tensor) -> str:
    place = "without numbers " if tensor.is_meta else ""
    form = "" if tensor.layout == torch.strided else f"{tensor.layout} "
    return f"{place}{form}{tensor.dtype}".replace("torch.", "")
