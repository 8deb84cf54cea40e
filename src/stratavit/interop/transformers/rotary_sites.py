"""Attention of transformers with rotary positions, made elastic where it stands: q and k lose whole rotation pairs.

What `elastic.rotary` does to timm's modules. Sines and cosines come to these classes as an argument; a small module
has a hook that picks those of its pairs, and stays a module of its class in everything else.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, a kept width of q and k, w kept width of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.delta import Weights
from stratavit.elastic.plain import rotated
from stratavit.elastic.rotary import ElasticRotary, pair_products
from stratavit.elastic.site import rotary_width
from stratavit.interop.transformers.sites import PACKED, TheirAttention, kind_of_theirs, returning, run_with

PAIRED = ("DINOv3ViTAttention", "MLCDAttention")  # they turn coordinates i and i + d / 2, and read `head_dim`
POSITIONS = "position_embeddings"  # the argument: cosines and sines, each [N, d]


def cuts_pairs(module: nn.Module) -> bool:
    """Whether q and k of a module of transformers are cut by rotation pairs."""
    return kind_of_theirs(module) is TheirAttention and type(module).__name__ in (*PAIRED, *PACKED)


class TheirRotary(TheirAttention, ElasticRotary):
    """Attention of transformers that turns q and k by halves."""

    split = False
    rotate_half = True

    def __init__(self, stock: Any) -> None:
        TheirAttention.__init__(self, stock)
        order = torch.arange(self.full_width // 2, device=self.out.weight.device)
        self.register_buffer("pairs", order, persistent=False)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; and what was cut before."""
        if hasattr(stock, "kept"):
            return "kept", "some of its rotation pairs are gone already; start from the full model"
        return super().refusal(stock)

    def numbers(self, width: int, weights: Weights | None) -> dict[str, Any]:
        """As of all modules of transformers, and the width of q and k."""
        return TheirAttention.numbers(self, width, weights) | {"qk": rotary_width(width, self.full_width)}

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module, and the columns of sines and cosines that it keeps."""
        width = weights.out_weight.shape[1] // self.heads
        columns, parts = self.scores_at(rotary_width(width, self.full_width))
        found = {**TheirAttention.tensors(self, weights), **({} if columns is None else {"kept": columns})}
        for name, (weight, bias) in zip(("q_proj", "k_proj"), parts, strict=True):
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return found

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens and what else the stock class returns; its own arguments."""
        if self.width == 0 or self.bypassed:
            return self.constant(hidden_states), None
        weights = self.weights_now()
        maps, columns = self.maps(hidden_states, weights, kwargs)
        layers: dict[str, Any] = {f"{name}_proj": returning(x) for name, x in zip("qkv", maps, strict=True)}
        layers[self.names.last] = lambda mixed: self.written(self._prefix(mixed, weights), weights)
        args, kwargs = picked_positions(args, kwargs, columns)
        double = run_with(self.stock, layers, head_dim=maps[0].shape[-1] // self.heads)
        found: tuple[Tensor, Any] = type(self.stock).forward(double, hidden_states, *args, **kwargs)
        return found

    def maps(self, x: Tensor, weights: Weights, given: Mapping[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """q, k and v, padded, of tokens ``[B, N, C]``, each ``[B, N, H*a]``; and the columns kept, None for all.

        Args:
            x: Tokens.
            weights: Of v and the map out of the heads.
            given: The other arguments of the stock class.
        """
        width = rotary_width(self.width, self.full_width)
        v = F.linear(x, weights.in_weight, weights.in_bias).unflatten(-1, (1, self.heads, -1))  # [B, N, 1, H, w]
        columns, parts = self.scores_at(width)
        q, k = (F.linear(x, *part) for part in parts)
        if self.observer is not None:
            self.observer.features(v)
            if columns is None:
                self.observer.pairs(lambda: self.products(q, k, given))
        return [q, k, F.pad(v[:, :, 0], (0, width - v.shape[-1])).flatten(-2)], columns

    def products(self, q: Tensor, k: Tensor, given: Mapping[str, Any]) -> Tensor:
        """`rotary.pair_products` of maps ``[B, N, H*d]`` that are not yet turned; tokens in front have no position."""
        cosines, sines = given[POSITIONS]
        turns, front = torch.cat([sines, cosines], dim=-1), q.shape[1] - sines.shape[-2]
        q, k = (rotated(x.unflatten(-1, (self.heads, -1)).transpose(1, 2), turns, front, True) for x in (q, k))
        return pair_products(q, k, half=True)


def picked_positions(args: Any, kwargs: dict[str, Any], columns: Tensor | None) -> tuple[Any, dict[str, Any]]:
    """Arguments of an attention module with the sines and cosines of the columns ``[a]`` that are kept; all if None."""
    if columns is None:
        return args, kwargs
    turns = [one.index_select(-1, columns) for one in kwargs[POSITIONS]]
    return args, {**kwargs, POSITIONS: tuple(turns)}


def pick_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook of a small module whose pairs are cut, see `picked_positions`."""
    return picked_positions(args, kwargs, module.kept)
