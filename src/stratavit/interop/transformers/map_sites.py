"""Attention of SAM, SAM 2 and ViTDet in transformers: tokens are a map, and one layer makes q, k and v.

Relative positions that are multiplied by q (SAM, ViTDet) leave q and k uncut; v is then padded to their width, as the
stock class reshapes all three alike. Without them (SAM 2) q, k and v are cut.

Shape legend: B images or windows, h, w sides of a map, N = h*w tokens, C token width, H heads, d full head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.attention import HeadsSite, Part
from stratavit.elastic.delta import Weights
from stratavit.elastic.layers import RESHAPES
from stratavit.interop.transformers.sites import MAPS, TheirAttention, kind_of_theirs, returning, run_with


def is_map(module: nn.Module) -> bool:
    """Whether a module of transformers is one of these."""
    return type(module).__name__ in MAPS and kind_of_theirs(module) is TheirAttention


def heads_of(stock: Any) -> int:
    """Number of heads."""
    return int(stock.num_attention_heads if hasattr(stock, "num_attention_heads") else stock.num_heads)


def turns_with_q(stock: Any) -> bool:
    """Whether there are relative positions that are multiplied by q."""
    return hasattr(stock, "rel_pos_h")


def parts_of_one(layer: nn.Linear) -> tuple[Part, Part, Part]:
    """Weights and biases of q, k and v, which one layer makes."""
    biases: Any = (None,) * 3 if layer.bias is None else layer.bias.chunk(3)
    q, k, v = zip(layer.weight.chunk(3), biases, strict=True)
    return q, k, v


class TheirMap(TheirAttention):
    """Attention over a map of tokens ``[B, h, w, C]``."""

    def __init__(self, stock: Any) -> None:
        self.tied, heads = not turns_with_q(stock), heads_of(stock)
        super(HeadsSite, self).__init__(stock, heads, stock.proj.in_features // heads)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """Stages begin with modules that pool queries or widen tokens; and what was cut before."""
        if type(stock.qkv) is not nn.Linear:
            return "qkv", "some of it is gone already; start from the full model"
        if getattr(stock, "query_stride", None) or stock.qkv.in_features != stock.proj.out_features:
            return "qkv", RESHAPES
        return None

    def parts(self) -> tuple[Part, Part, Part]:
        """See `HeadsSite.parts`."""
        return parts_of_one(self.stock.qkv)

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module, see `small_modules.resized`."""
        weight, bias, found = weights.in_weight, weights.in_bias, self.last_tensors(weights)
        if not self.tied:
            q, k, _ = self.parts()
            weight = torch.cat([q[0], k[0], weight])
            bias = None if bias is None or q[1] is None or k[1] is None else torch.cat([q[1], k[1], bias])
        return found | {"qkv.weight": weight, "qkv.bias": bias}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tokens ``[B, h, w, C]`` to the same; the arguments of the stock class, and what else it returns."""
        if self.width == 0 or self.bypassed:
            constant = self.constant(hidden_states)
            return (constant, None) if returns_more(self.stock) else constant
        weights, tokens = self.weights_now(), hidden_states.flatten(1, 2)  # [B, N, C]
        own = self.cut_features(tokens, weights)
        if self.tied:
            maps = [x.flatten(-2) for x in own]
        else:
            maps = [F.linear(tokens, *part) for part in self.parts()[:2]]
            maps.append(F.pad(own[0], (0, self.full_width - own[0].shape[-1])).flatten(-2))

        def written(mixed: Tensor) -> Tensor:
            read = self._prefix(mixed.flatten(1, 2), weights)  # [B, N, H*w]
            return self.written(read, weights).unflatten(1, mixed.shape[1:3])

        layers = {"qkv": returning(torch.cat(maps, dim=-1)), "proj": written}
        width = own[0].shape[-1] if self.tied else self.full_width
        double = run_with(self.stock, layers, scale=width**-0.5)
        return type(self.stock).forward(double, hidden_states, *args, **kwargs)


def returns_more(stock: Any) -> bool:
    """Whether an attention module returns its weights, or nothing in their place, next to tokens."""
    return type(stock).__name__ != "Sam2MultiScaleAttention"
