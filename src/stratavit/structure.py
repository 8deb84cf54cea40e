"""What can be cut: sites and their units. And what every part needs to know of a model: type, device, mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratavit.classifier import classes_in_head
from stratavit.wrappers import unwrapped

HEAD_DIM_UNIT = 8  # coordinates of the head width that are dropped together (paper, implementation details)
MLP_UNITS = 32  # groups that the MLP hidden width is cut into (paper, implementation details)

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """One module that can be cut.

    Attributes:
        name: timm module path, for example ``blocks.0.attn``.
        kind: ``attention`` (width is the head_dim) or ``mlp`` (width is the hidden_features).
        width: Full width.
        heads: Number of heads; 1 for an MLP.
        dim: Token width C that the module reads and writes.
        in_biases: Number of the maps into the channels that have a bias.
        out_bias: Whether proj / fc2 has a bias.
        steps: Widths at which units end, ascending from 0 to `width`; unit i is
            ``[steps[i], steps[i + 1])``.
        maps: Linear maps into the channels: 3 for q, k and v, 1 for an MLP or for v alone, 2 for a gated MLP.
        qk_width: Width per head of q and k where these stay whole, and `width` is that of v; 0 where they are cut, too.
        fixed_params: Parameters that the module has at every width above 0.
    """

    name: str
    kind: Kind
    width: int
    heads: int
    dim: int
    in_biases: int
    out_bias: bool
    steps: tuple[int, ...]
    maps: int
    qk_width: int = 0
    fixed_params: int = 0


def attention_steps(head_dim: int, unit: int = HEAD_DIM_UNIT) -> tuple[int, ...]:
    """Unit ends of a head width: multiples of `unit`, then the full width."""
    return (*range(0, head_dim, unit), head_dim)


def mlp_steps(hidden: int, units: int = MLP_UNITS) -> tuple[int, ...]:
    """Unit ends of an MLP hidden width: `units` groups as equal as whole numbers allow."""
    units = max(1, min(units, hidden))  # more would be the same: every channel its own
    return tuple(sorted({hidden * i // units for i in range(units + 1)}))


def with_units(sites: tuple[Site, ...], head_dim_unit: int, mlp_units: int) -> tuple[Site, ...]:
    """The same sites, cut in other units: groups of `head_dim_unit` coordinates, `mlp_units` groups of hidden ones."""
    steps = {"attention": lambda w: attention_steps(w, head_dim_unit), "mlp": lambda w: mlp_steps(w, mlp_units)}
    return tuple(replace(site, steps=steps[site.kind](site.width)) for site in sites)


@dataclass(frozen=True)
class Stages:
    """A model's forward pass in three parts: ``tail(blocks(stem(images)))`` equals ``model(images)``.

    Attributes:
        stem: Images ``[B, 3, H, W]`` to tokens ``[B, N, C]`` (Swin: ``[B, H, W, C]``, everywhere).
        blocks: Name of every residual block (or step between blocks), and what it does to tokens.
        tail: Tokens to logits ``[B, classes]``.
        pool: Tokens to what the head reads, ``[B, C]``.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]
    tail: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]

    def answers(self, images: Tensor) -> Tensor:
        """All three parts: images ``[B, 3, H, W]`` to logits ``[B, classes]``."""
        return self.tail(self.through(self.stem(images)))

    def through(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens that enter block `first` to tokens that leave the last one."""
        for _, block in self.blocks[first:]:
            tokens = block(tokens)
        return tokens

    def block_of(self, site: str) -> int:
        """Number of the block that a site belongs to."""
        return next(i for i, (name, _) in enumerate(self.blocks) if site.startswith(name + "."))


def is_super_network(model: nn.Module) -> bool:
    """Whether a model is a super-network (`SuperNet`), as its class says of itself."""
    return bool(getattr(type(model), "super_network", False))


def classes_of(model: nn.Module) -> int:
    """Classes that a model tells apart; 0 where it answers with features: no head, one into an embedding, one output.

    Args:
        model: A timm model, or a super-network of one, wrapped or not; any other is taken to have classes.
    """
    inner: Any = unwrapped(model)
    inner = unwrapped(inner.model) if is_super_network(inner) else inner
    if getattr(inner, "embedding", False):
        return 0
    if hasattr(inner, "config") and not hasattr(inner, "num_classes"):  # of transformers
        return _several(getattr(inner, "num_labels", 0))
    told = getattr(inner, "num_classes", None)
    found = None if told is None else classes_in_head(inner)  # a head may have been replaced
    return _several(2 if told is None else told if found is None else found)


def _several(classes: int) -> int:
    return int(classes) if classes > 1 else 0


@contextmanager
def measured_at(model: Any, spec: Mapping[str, int] | None) -> Iterator[Callable[[Tensor], Any]]:
    """Eval mode, and what maps images to outputs inside: a super-network at a spec, or any other model as it is.

    Args:
        model: Its weights must not change inside.
        spec: For a super-network, or for a wrapper of one that takes ``(images, spec)``.
    """
    with eval_mode(model), model.at(spec, fixed=True) if is_super_network(model) else nullcontext() as inner:
        if inner is not None or spec is None:
            yield model if inner is None else inner
        else:
            yield lambda images: model(images, spec)


def computed_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Buffers that are not saved, because a model computes them when it is built: full name, module, key, tensor."""
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            buffer = getattr(module, key)
            if buffer is not None:
                yield f"{name}.{key}".lstrip("."), module, key, buffer


def digest_of(tensors: Iterable[tuple[Any, Tensor]]) -> bytes:
    """A hash of named tensors: names, types, shapes and numbers, however they were changed."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


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
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
