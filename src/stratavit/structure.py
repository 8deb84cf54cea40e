"""Which modules of a model can be cut. The only place, with `architecture`, that knows timm's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError

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
        in_bias: Whether qkv / fc1 has a bias.
        out_bias: Whether proj / fc2 has a bias.
        steps: Widths at which units end, ascending from 0 to `width`; unit i is
            ``[steps[i], steps[i + 1])``.
    """

    name: str
    kind: Kind
    width: int
    heads: int
    dim: int
    in_bias: bool
    out_bias: bool
    steps: tuple[int, ...]


def attention_steps(head_dim: int, unit: int = HEAD_DIM_UNIT) -> tuple[int, ...]:
    """Unit ends of a head width: multiples of `unit`, then the full width."""
    return (*range(0, head_dim, unit), head_dim)


def mlp_steps(hidden: int, units: int = MLP_UNITS) -> tuple[int, ...]:
    """Unit ends of an MLP hidden width: `units` groups as equal as whole numbers allow."""
    return tuple(sorted({hidden * i // units for i in range(units + 1)}))


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Finds the attention and MLP modules that can be cut, in order of execution.

    Args:
        model: A timm `VisionTransformer` (ViT, DeiT, DeiT-III, AugReg).

    Returns:
        Two sites per block, attention first.

    Raises:
        UnsupportedModelError: A part cannot be cut; names the module and the reason.
    """
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(
            f"cannot cut a {type(model).__name__}: only timm VisionTransformer models "
            "(ViT, DeiT, DeiT-III, AugReg) are supported so far"
        )
    if model.attn_pool is not None:
        _refuse("attn_pool", "attention pooling is not supported yet; use a model with token or average pooling")
    if not model.global_pool:
        _refuse("global_pool", "a model that answers with all its tokens is not supported; pool them, e.g. 'token'")
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(VisionTransformer, method):
            _refuse(method, f"{type(model).__name__} overrides the order of execution of timm's VisionTransformer")
    sites: list[Site] = []
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if type(block) is not Block:
            reason = f"a {type(block).__name__} is not the sequential pre-norm timm Block (attention, then MLP)"
            _refuse(name, reason)
        sites += [_attention_site(f"{name}.attn", block.attn), _mlp_site(f"{name}.mlp", block.mlp)]
    return tuple(sites)


def with_units(sites: tuple[Site, ...], head_dim_unit: int, mlp_units: int) -> tuple[Site, ...]:
    """The same sites, cut in other units: groups of `head_dim_unit` coordinates, `mlp_units` groups of hidden ones."""
    steps = {"attention": lambda w: attention_steps(w, head_dim_unit), "mlp": lambda w: mlp_steps(w, mlp_units)}
    return tuple(replace(site, steps=steps[site.kind](site.width)) for site in sites)


def _attention_site(name: str, attn: Any) -> Site:
    if type(attn) is not Attention:
        _refuse(name, f"a {type(attn).__name__} is not timm's plain Attention")
    for part in ("q_norm", "k_norm"):
        if not isinstance(getattr(attn, part), nn.Identity):
            _refuse(f"{name}.{part}", "query/key normalisation does not allow q and k to be rotated (qk-norm)")
    if not isinstance(attn.norm, nn.Identity):
        _refuse(f"{name}.norm", "the norm between the heads and proj mixes channels (scale norm)")
    if getattr(attn, "gate", None) is not None:
        _refuse(f"{name}.gate", "the elementwise gate on the heads' output does not allow v to be rotated")
    return Site(
        name,
        "attention",
        width=attn.head_dim,
        heads=attn.num_heads,
        dim=attn.qkv.in_features,
        in_bias=attn.qkv.bias is not None,
        out_bias=attn.proj.bias is not None,
        steps=attention_steps(attn.head_dim),
    )


def _mlp_site(name: str, mlp: Any) -> Site:
    if type(mlp) is not Mlp:
        _refuse(name, f"a {type(mlp).__name__} is not timm's plain Mlp (gated MLPs are not supported yet)")
    if not isinstance(mlp.norm, nn.Identity):
        _refuse(f"{name}.norm", "the norm between fc1 and fc2 depends on every hidden channel at once")
    for part in ("fc1", "fc2"):
        if not isinstance(getattr(mlp, part), nn.Linear):
            _refuse(f"{name}.{part}", f"expected a Linear layer, found {type(getattr(mlp, part)).__name__}")
    return Site(
        name,
        "mlp",
        width=mlp.fc1.out_features,
        heads=1,
        dim=mlp.fc1.in_features,
        in_bias=mlp.fc1.bias is not None,
        out_bias=mlp.fc2.bias is not None,
        steps=mlp_steps(mlp.fc1.out_features),
    )


def _refuse(module: str, reason: str) -> None:
    raise UnsupportedModelError(f"cannot cut this model: {module}: {reason}")


@dataclass(frozen=True)
class Stages:
    """A model's forward pass in three parts: ``tail(blocks(stem(images)))`` equals ``model(images)``.

    Attributes:
        stem: Images ``[B, 3, H, W]`` to tokens ``[B, N, C]``.
        blocks: The residual blocks, each tokens to tokens.
        tail: Tokens ``[B, N, C]`` to logits ``[B, classes]``.
        pool: Tokens ``[B, N, C]`` to what the head reads, ``[B, C]``.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: tuple[nn.Module, ...]
    tail: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]

    def through(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens ``[B, N, C]`` that enter block `first` to tokens that leave the last one."""
        for block in self.blocks[first:]:
            tokens = block(tokens)
        return tokens


def stages(model: nn.Module) -> Stages:
    """Splits a supported model at its blocks, so that work before a block can be shared."""
    assert isinstance(model, VisionTransformer)

    def stem(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def tail(tokens: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(model.norm(tokens))
        return logits

    def pool(tokens: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(model.norm(tokens), pre_logits=True)
        return pooled

    return Stages(stem, tuple(model.blocks), tail, pool)


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm whose bias is added to what the head reads; None if there is none with a bias, or two heads."""
    assert isinstance(model, VisionTransformer)
    if isinstance(model, VisionTransformerDistilled):
        return None
    norm: nn.Module = model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm
    return norm if getattr(norm, "bias", None) is not None else None


def layer_scale(model: nn.Module, site: str) -> Tensor | None:
    """LayerScale factors ``[C]`` of a site's output, or None."""
    block, _, leaf = site.rpartition(".")
    scale = getattr(model.get_submodule(block), "ls1" if leaf == "attn" else "ls2")
    return getattr(scale, "gamma", None)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Floating-point type of a model's weights."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def model_device(model: nn.Module) -> torch.device:
    """Device of a model's weights."""
    return next(model.parameters()).device


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
