"""What every part needs to know of a model: classes, type, device, mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.utils.classifier import classes_in_head
from stratavit.utils.wrappers import unwrapped


def is_super_network(model: nn.Module) -> bool:
    """Whether a model is a super-network (`SuperNet`), as its class says of itself."""
    return bool(getattr(type(model), "super_network", False))


def classes_of(model: nn.Module) -> int:
    """Classes that a model tells apart; 0 where it outputs features: no head, one into an embedding, one output.

    Args:
        model: A timm model, or a super-network of one, wrapped or not; any other is taken to have classes.
    """
    inner: Any = unwrapped(model)
    inner = unwrapped(inner.model) if is_super_network(inner) else inner
    if getattr(inner, "embedding", False):
        return 0
    classes = getattr(inner, "num_classes", None)
    if classes is not None:
        found = classes_in_head(inner)  # a head may have been replaced
        classes = classes if found is None else found
    else:
        classes = getattr(inner, "num_labels", 0) if hasattr(inner, "config") else 2  # `config` of transformers
    return int(classes) if classes > 1 else 0


@contextmanager
def measured_at(model: Any, spec: Mapping[str, int] | None) -> Iterator[Callable[[Tensor], Any]]:
    """Eval mode, and what maps images to outputs inside: a super-network at a spec, or any other model as it is.

    Args:
        model: Its weights must not change inside.
        spec: For a super-network, or for a wrapper of one that takes ``(images, spec)``.
    """
    with eval_mode(model), model.at(spec, fixed=True) if is_super_network(model) else nullcontext(model) as inner:
        yield inner if spec is None or is_super_network(model) else lambda images: model(images, spec)


def computed_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Buffers that are not saved, because a model computes them when it is built: full name, module, key, tensor."""
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            buffer = getattr(module, key)
            if buffer is not None:
                yield f"{name}.{key}".lstrip("."), module, key, buffer


def patches_of(model: Any) -> Any:
    """The module that turns images into patches, under either of timm's names; None if there is none."""
    first = next(iter(getattr(model, "patch_embeds", ())), None)  # of several, one for each stage
    return getattr(model, "patch_embed", None) or getattr(model, "embeds", None) or first


def model_dtype(model: nn.Module) -> torch.dtype:
    """Floating-point type of a model's weights."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def model_device(model: nn.Module) -> torch.device:
    """Device of a model's weights."""
    return next(model.parameters()).device


def takes_gradients(model: nn.Module) -> bool:
    """Whether gradients can be had now: neither this call nor the making of the weights is in inference mode."""
    return not torch.is_inference_mode_enabled() and not any(p.is_inference() for p in model.parameters())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs the body in eval mode; every module is then as it was, also where only a part was training."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Runs the body with half-precision weights held in float32; casting there and back is exact."""
    dtype = model_dtype(model)
    try:
        if dtype in (torch.float16, torch.bfloat16):
            model.float()
        yield
    finally:
        model.to(dtype)


@contextmanager
def full_products() -> Iterator[None]:
    """Runs the body with products of float32 matrices in float32, whatever the process allows (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Runs the body with no weight requiring a gradient."""
    with temporarily("requires_grad", dict.fromkeys(model.parameters(), False)):
        yield


@contextmanager
def temporarily(name: str, values: Mapping[Any, Any]) -> Iterator[None]:
    """The keys of `values`, modules for example, have these values of an attribute inside."""
    before = {owner: getattr(owner, name) for owner in values}
    try:
        for owner, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for owner, value in before.items():
            setattr(owner, name, value)
