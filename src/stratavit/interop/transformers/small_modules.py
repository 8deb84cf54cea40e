"""Modules of transformers with fewer channels: the stock class, its linear layers of other sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.plain import Constant
from stratavit.errors import ArtifactError, described
from stratavit.interop.transformers.map_sites import heads_of, is_map, returns_more, turns_with_q
from stratavit.interop.transformers.models import Absent, ConstantAttention
from stratavit.interop.transformers.rotary_sites import cuts_pairs, pick_positions
from stratavit.interop.transformers.sites import Names, is_rotary, names_of
from stratavit.models.freezing import freeze_like


class PaddedHeads(nn.Linear):
    """A map into the first channels of every head; the others are zeros.

    Args:
        heads: H.
        head_dim: Channels of a head that the attention reads, d.
    """

    heads: int
    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, H*d]``."""
        found = super().forward(x).unflatten(-1, (self.heads, -1))  # [B, N, H, w]
        return nn.functional.pad(found, (0, self.head_dim - found.shape[-1])).flatten(-2)


class PaddedValues(nn.Linear):
    """A layer for q, k and v of every head, of which v is padded with zeros to the width of q and k.

    Args:
        heads: H.
        head_dim: Width of q and k, d.
    """

    heads: int
    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., 3*H*d]``."""
        scores, v = super().forward(x).tensor_split([2 * self.heads * self.head_dim], dim=-1)
        v = v.unflatten(-1, (self.heads, -1))  # [..., H, w]
        return torch.cat([scores, nn.functional.pad(v, (0, self.head_dim - v.shape[-1])).flatten(-2)], dim=-1)


class ConstantPacked(Constant):
    """A `Constant` in the place of an attention module that returns tokens alone."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Tokens ``[..., C]`` to the same constant for each."""
        return super().forward(hidden_states)


class FirstOfHeads(nn.Linear):
    """A map that reads the first channels of every head."""

    heads: int

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, H*d]`` to ``[B, N, C]``."""
        width = self.in_features // self.heads
        return super().forward(x.unflatten(-1, (self.heads, -1))[..., :width].flatten(-2))


@torch.no_grad()
def resized(stock: Any, width: int, bias: bool, qk: int | None = None) -> nn.Module:
    """A module of the same class with other widths, its layers untrained; what is not cut is copied.

    Args:
        stock: An attention or MLP module, of full size.
        width: Kept channels (of every head).
        bias: There is a bias behind them.
        qk: Kept channels of every head of q and k, where these are cut by rotation pairs; None keeps all of these.

    Raises:
        ArtifactError: The width is not one of a cut module.
    """
    names = names_of(stock)
    if names is None:
        raise ArtifactError(f"expected an attention or MLP module of transformers, found a {type(stock).__name__}")
    attention = names.attention
    last = getattr(stock, names.last)
    full = last.in_features
    if attention:
        full = full // heads_of(stock) if is_map(stock) else stock.head_dim
    if type(width) is not int or not 0 <= width <= full:
        raise ArtifactError(f"expected a width from 0 to {full}, got {described(width)}")
    if width == 0:
        alone = not returns_more(stock) if is_map(stock) else names.first == ("qkv",)
        kind = ConstantPacked if alone else ConstantAttention if attention else Constant
        gone = kind(last.out_features * bias)
        gone.add_module(names.first[0], Absent(last.out_features))
        return gone.to(last.weight.dtype)
    if not attention:
        return _mlp(stock, names, width, bias)
    if is_map(stock):
        return _map(stock, width, bias)
    if is_rotary(stock):
        return _rotary(stock, names, width, bias, full if qk is None else _checked(qk, width, stock))
    return _attention(stock, names.last, width, bias)


def _checked(qk: Any, width: int, stock: Any) -> int:
    """A width of q and k, from a file or not."""
    if type(qk) is not int or qk % 2 or not width <= qk <= stock.head_dim:
        raise ArtifactError(f"qk: expected an even width from {width} to {stock.head_dim}, got {described(qk)}")
    if qk < stock.head_dim and not cuts_pairs(stock):
        raise ArtifactError(f"qk: q and k of a {type(stock).__name__} cannot be cut")
    return qk


def _rotary(stock: Any, names: Names, width: int, bias: bool, qk: int) -> Any:
    """Attention whose v is padded to the width of q and k."""
    out, full, last = getattr(stock, names.last), stock.head_dim, names.last
    heads = out.in_features // full
    layers = {last: _linear(out, inputs=heads * width, bias=bias)}
    value: str
    padded: type[nn.Linear]
    if names.first == ("qkv",):
        value, padded = "qkv", PaddedValues
        layers[value] = _linear(stock.qkv, outputs=heads * (2 * qk + width))
    else:
        value, padded = "v_proj", PaddedHeads
        layers[value] = _linear(stock.v_proj, outputs=heads * width)
        layers |= {
            name: _linear(getattr(stock, name), outputs=heads * qk) for name in ("q_proj", "k_proj") if qk < full
        }
    if width < qk:
        layers[value].__class__, layers[last].__class__ = padded, FirstOfHeads
        layers[value].heads = layers[last].heads = heads
        layers[value].head_dim = qk
    small = _copy_with(stock, layers)
    if qk < full:
        small.head_dim = qk  # the factor of the scores stays
        small.register_buffer("kept", torch.zeros(qk, dtype=torch.long, device=out.weight.device))
        small.register_forward_pre_hook(pick_positions, with_kwargs=True)
    return small


def _attention(stock: Any, last: str, width: int, bias: bool) -> Any:
    heads, out = stock.q_proj.out_features // stock.head_dim, getattr(stock, last)
    layers = {name: _linear(getattr(stock, name), outputs=heads * width) for name in ("q_proj", "k_proj", "v_proj")}
    layers[last] = _linear(out, inputs=heads * width, bias=bias)
    small = _copy_with(stock, layers)
    small.head_dim = width
    for scale in ("scaling", "scale"):
        if hasattr(small, scale):
            setattr(small, scale, width**-0.5)
    return small


def _map(stock: Any, width: int, bias: bool) -> Any:
    """Attention over a map: all three of q, k and v are narrower, or v, padded to the width of the others."""
    heads = heads_of(stock)
    full = stock.proj.in_features // heads
    scores = full if turns_with_q(stock) else width
    layers = {
        "qkv": _linear(stock.qkv, outputs=heads * (2 * scores + width)),
        "proj": _linear(stock.proj, inputs=heads * width, bias=bias),
    }
    if width < scores:
        layers["qkv"].__class__, layers["proj"].__class__ = PaddedValues, FirstOfHeads
        layers["qkv"].heads = layers["proj"].heads = heads
        layers["qkv"].head_dim = scores
    small = _copy_with(stock, layers)
    small.scale = scores**-0.5
    return small


def _mlp(stock: Any, names: Any, width: int, bias: bool) -> Any:
    layers = {name: _linear(getattr(stock, name), outputs=width) for name in names.first}
    return _copy_with(stock, layers | {names.last: _linear(getattr(stock, names.last), inputs=width, bias=bias)})


def _linear(old: nn.Linear, inputs: int | None = None, outputs: int | None = None, bias: bool | None = None) -> Any:
    """A layer like another, of another size."""
    sizes = (old.in_features if inputs is None else inputs, old.out_features if outputs is None else outputs)
    own = old.bias is not None if bias is None else bias
    return nn.Linear(*sizes, own, device=old.weight.device, dtype=old.weight.dtype)


def _copy_with(stock: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    """A copy of a module with other layers; it shares the configuration."""
    memo: dict[int, Any] = {id(getattr(stock, name)): layer for name, layer in layers.items()}
    config = getattr(stock, "config", None)
    return copy.deepcopy(stock, memo | {id(config): config})


@torch.no_grad()
def small_module(elastic: ElasticSite, width: int) -> nn.Module:
    """The module of transformers that an elastic one becomes at a width, with its own copies of the weights."""
    weights = elastic.weights_at(width) if width else None
    numbers = elastic.numbers(width, weights)  # type: ignore[arg-type]
    small = resized(elastic.stock, **numbers)
    tensors = {"bias": elastic.bias_alone()} if weights is None else elastic.tensors(weights)
    own = small.state_dict()
    for name, tensor in tensors.items():
        if tensor is not None:
            own[name].copy_(tensor)
    small.to(elastic.out.weight.device)
    freeze_like(small, elastic.stock)  # type: ignore[arg-type]
    return small.train(elastic.training)
