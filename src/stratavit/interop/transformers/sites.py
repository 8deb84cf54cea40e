"""Attention and MLP modules of transformers made elastic where they stand, whatever model they are part of.

The forward pass stays that of the stock class: it is run with stand-ins for the linear layers, which return channels
that were computed before, and read the output. So masks, relative or rotary positions and the choice of the attention
kernel are what they are in transformers.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, m full hidden width, w kept width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.attention import HeadsSite, Part, prefix_of_heads
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.delta import Weights
from stratavit.elastic.mlp import ElasticMlp

ROTARY = (
    "position_embeddings",
    "rotary_pos_emb",
    "rope",
    "freqs_cis",
)  # arguments of a forward pass that turns q and k
PACKED = ("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention")  # see `packed_sites`
MAPS = ("SamVisionAttention", "SamVisionSdpaAttention", "Sam2MultiScaleAttention", "VitDetAttention")  # see `map_sites`
_SCALES = ("scaling", "scale")


class Names(NamedTuple):
    """Names of the linear layers of a module: into its channels, and out of them."""

    first: tuple[str, ...]
    last: str

    @property
    def attention(self) -> bool:
        """Whether the module is an attention; else an MLP."""
        return self.first[0] in ("q_proj", "qkv")


def names_of(module: nn.Module) -> Names | None:
    """The layers of an attention or MLP module of transformers; None if it is neither, or of an unknown form."""
    layers = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if type(module).__name__ in (*PACKED, *MAPS) and {"qkv", "proj"} <= layers:
        return Names(("qkv",), "proj")
    attention = {"q_proj", "k_proj", "v_proj"} <= layers
    for last in ("o_proj", "out_proj"):
        if attention and last in layers and hasattr(module, "head_dim"):
            return Names(("q_proj", "k_proj", "v_proj"), last)
    mlps: tuple[tuple[tuple[str, ...], str], ...]
    mlps = ((("gate_proj", "up_proj"), "down_proj"), (("up_proj",), "down_proj"), (("fc1",), "fc2"))
    if type(module).__name__.endswith("MLP"):  # not the mergers of Qwen3-VL, which join four tokens
        mlps = (*mlps, (("linear_fc1",), "linear_fc2"))
    if type(module).__name__ in ("SamMLPBlock", "Sam2FeedForward"):
        mlps = ((("lin1",), "lin2"), (("proj_in",), "proj_out"))
    return next((Names(first, last) for first, last in mlps if {*first, last} <= layers), None)


def kind_of_theirs(module: nn.Module) -> type[TheirAttention | TheirMlp] | None:
    """The elastic class of a module of transformers, without rotation pairs; None if there is none."""
    names = names_of(module) if _is_theirs(module) else None
    return None if names is None else TheirAttention if names.attention else TheirMlp


def why_unknown(module: nn.Module) -> str | None:
    """Why a module of transformers that is called an attention or an MLP is not cut; None of others."""
    if not _is_theirs(module) or not type(module).__name__.endswith(("Attention", "MLP", "Mlp", "FFN")):
        return None
    return f"a {type(module).__name__} has other maps than q_proj, k_proj, v_proj and o_proj, or fc1 and fc2"


def _is_theirs(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] in ("transformers", "transformers_modules")


def run_with(stock: nn.Module, layers: Mapping[str, Callable[..., Any]], **attributes: Any) -> Any:
    """A shallow double of a module, with other layers and attributes; its `forward` is the class's own."""
    double: Any = object.__new__(type(stock))
    double.__dict__.update(stock.__dict__, **attributes, _modules={**stock._modules, **layers})
    return double


class TheirSite(ElasticSite):
    """What attention and MLP modules of transformers have in common: they keep their stock module, whole.

    Attributes:
        stock: The module; its layers hold the weights.
        names: Of these layers.
    """

    stock: Any
    names: Names

    def _adopt(self, stock: nn.Module) -> None:
        self.names = _names(stock)
        self.add_module("stock", stock)

    @property
    def last(self) -> nn.Linear:
        """The map out of the channels."""
        layer: nn.Linear = getattr(self.stock, self.names.last)
        return layer

    def numbers(self, width: int, weights: Weights | None) -> dict[str, Any]:
        """Width, and whether there is a bias behind the channels."""
        bias = self.bias_alone() if weights is None else weights.out_bias
        return {"width": width, "bias": bias is not None}

    def last_tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module's map out of the channels, see `small_modules.resized`."""
        return {f"{self.names.last}.weight": weights.out_weight, f"{self.names.last}.bias": weights.out_bias}


class TheirAttention(TheirSite, HeadsSite):
    """Attention of transformers with maps `q_proj`, `k_proj`, `v_proj` and out of the heads.

    With rotary positions q and k stay uncut; v is then padded to the full head_dim, as the stock class reshapes it.
    Where the class is known to turn whole pairs, see `rotary_sites`.
    """

    def __init__(self, stock: Any) -> None:
        self.tied = not is_rotary(stock)
        heads = sum(getattr(stock, name).out_features for name in _names(stock).first) // (3 * stock.head_dim)
        super(HeadsSite, self).__init__(stock, heads, stock.head_dim)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """Shared heads of k and v, norms of q and k, and other parts between the maps."""
        if type(stock.v_proj) is not nn.Linear:
            return "v_proj", f"is a {type(stock.v_proj).__name__}; start from the full model if it was cut before"
        sizes = {layer.out_features for layer in (stock.q_proj, stock.k_proj, stock.v_proj)}
        if len(sizes) > 1:
            return "v_proj", "several heads share one head of k and v (grouped-query attention)"
        last = _names(stock).last
        known = ("q_proj", "k_proj", "v_proj", last, "relative_position_bias")
        for name, child in stock.named_children():
            if name not in known and any(True for _ in child.parameters()):
                return name, f"a {type(child).__name__} between the maps may not allow heads to be turned"
        if not any(hasattr(stock, name) for name in _SCALES):
            return "scaling", "expected a factor of the scores of that name"
        return None

    @property
    def proj(self) -> nn.Linear:  # type: ignore[override]
        """The map out of the heads."""
        return self.last

    def parts(self) -> tuple[Part, Part, Part]:
        """See `HeadsSite.parts`."""
        q, k, v = ((layer.weight, layer.bias) for layer in (getattr(self.stock, f"{name}_proj") for name in "qkv"))
        return q, k, v

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """q, k and v at a head_dim, one after the other, q scaled as the smaller factor of the scores asks; or v."""
        weights, biases = zip(*self.cut_parts(), strict=True)
        weight = self.cut_in(torch.cat(weights), width)
        if all(bias is None for bias in biases):
            return weight, None
        zeros = weights[0].new_zeros(len(weights[0]))
        return weight, self.cut_in(torch.cat([zeros if bias is None else bias for bias in biases]), width)

    def cut_in(self, weight: Tensor, width: int) -> Tensor:
        """See `ElasticSite.cut_in`; the part of q is scaled."""
        parts = prefix_of_heads(weight, len(self.cut_parts()) * self.heads, width)
        if not self.tied or width == self.full_width:
            return parts
        q, k, v = parts.chunk(3)
        return torch.cat([q * (width / self.full_width) ** 0.5, k, v])

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module, see `small_modules.resized`."""
        found = self.last_tensors(weights)
        if not self.tied:
            q, k, _ = self.parts()
            found |= {"q_proj.weight": q[0], "q_proj.bias": q[1], "k_proj.weight": k[0], "k_proj.bias": k[1]}
        names = ("q_proj", "k_proj", "v_proj")[-len(self.cut_parts()) :]
        biases = (None,) * len(names) if weights.in_bias is None else weights.in_bias.chunk(len(names))
        for name, weight, bias, (_, own) in zip(
            names, weights.in_weight.chunk(len(names)), biases, self.cut_parts(), strict=True
        ):
            found |= {f"{name}.weight": weight, f"{name}.bias": None if own is None else bias}
        return found

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Tokens ``[B, N, C]`` to tokens and what else the stock class returns; its own arguments."""
        if self.width == 0 or self.bypassed:
            return self.constant(hidden_states), None
        weights, width = self.weights_now(), self.full_width
        own = self.cut_features(hidden_states, weights)
        if self.tied:
            width = own[-1].shape[-1]
            given = dict(zip(("q_proj", "k_proj", "v_proj"), own, strict=True))
        else:
            given = {"v_proj": F.pad(own[0], (0, width - own[0].shape[-1]))}  # [B, N, H, d]
        layers: dict[str, Any] = {name: returning(x.flatten(-2)) for name, x in given.items()}
        layers[self.names.last] = lambda mixed: self.written(self._prefix(mixed, weights), weights)
        scales = {name: width**-0.5 for name in _SCALES if hasattr(self.stock, name)} if self.tied else {}
        double = run_with(self.stock, layers, head_dim=width, **scales)
        found: tuple[Tensor, Any] = type(self.stock).forward(double, hidden_states, *args, **kwargs)
        return found

    def cut_features(self, tokens: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        """q, k and v of tokens ``[B, N, C]``, or v alone, each ``[B, N, H, w]``; the observer sees them."""
        features = F.linear(tokens, weights.in_weight, weights.in_bias)
        features = features.unflatten(-1, (3 if self.tied else 1, self.heads, -1))  # [B, N, 3 or 1, H, w]
        if self.observer is not None:
            self.observer.features(features)
        q, *rest = features.unbind(2)
        if self.tied and self.probe is not None and self.probe.gate is not None:
            q = q * self.probe.gate
        return q, *rest

    def _prefix(self, mixed: Tensor, weights: Weights) -> Tensor:
        """What `proj` reads, ``[B, N, H*w]``, of the heads' output, which is padded where q and k stay uncut."""
        width = weights.out_weight.shape[1] // self.heads
        return mixed if self.tied else mixed.unflatten(-1, (self.heads, -1))[..., :width].flatten(-2)


class TheirMlp(TheirSite, ElasticMlp):
    """An MLP of transformers: `fc1` and `fc2`, or a gated one of `gate_proj`, `up_proj` and `down_proj`."""

    def __init__(self, stock: Any) -> None:
        names = _names(stock)
        self.maps = len(names.first)
        super(ElasticMlp, self).__init__(stock, 1, getattr(stock, names.last).in_features)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """A norm, or another part with weights between the maps."""
        names = _names(stock)
        for name, child in stock.named_children():
            if name not in (*names.first, names.last) and any(True for _ in child.parameters()):
                return name, f"a {type(child).__name__} between the maps depends on every hidden channel at once"
        return None

    @property
    def fc2(self) -> nn.Linear:  # type: ignore[override]
        """The map out of the hidden units."""
        return self.last

    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """See `ElasticMlp.rows`."""
        return [(layer.weight, layer.bias) for layer in (getattr(self.stock, name) for name in self.names.first)]

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module, see `small_modules.resized`."""
        found = self.last_tensors(weights)
        parts = weights.in_weight.chunk(self.maps)
        biases = (None,) * self.maps if weights.in_bias is None else weights.in_bias.chunk(self.maps)
        for name, weight, bias in zip(self.names.first, parts, biases, strict=True):
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return found

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of the stock class."""
        if self.width == 0 or self.bypassed:
            return self.constant(hidden_states)
        if hidden_states.dim() == 2:  # images packed into one sequence
            return self.forward(hidden_states.unsqueeze(0), *args, **kwargs).squeeze(0)
        weights = self.weights_now()
        hidden = F.linear(hidden_states, weights.in_weight, weights.in_bias).chunk(self.maps, dim=-1)  # [B, N, w] each
        layers: dict[str, Any] = {name: returning(x) for name, x in zip(self.names.first, hidden, strict=True)}
        layers[self.names.last] = lambda units: self.written(units, weights)
        return type(self.stock).forward(run_with(self.stock, layers), hidden_states, *args, **kwargs)


def returning(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer whose output is known."""
    return lambda _: x


def _names(stock: nn.Module) -> Names:
    names = names_of(stock)
    assert names is not None, "asked only of modules that `names_of` knows"
    return names


def is_rotary(stock: nn.Module) -> bool:
    """Whether the forward pass of an attention module turns q and k by their positions."""
    return bool({*ROTARY} & inspect.signature(type(stock).forward).parameters.keys())
