"""Attention with rotary positions that cuts q and k, too: by whole rotation pairs, in an order of its own.

Rotary positions turn two coordinates of q and k, a pair, by an angle that follows from the pair and the position alone.
So the score of two tokens is a sum over pairs, and leaving out a pair in q and k leaves out its term and nothing else.
All heads of a module leave out the same pairs; sines and cosines of the others are picked out of those of the model.

Shape legend: B images, N tokens, H heads, d full head_dim, P = d / 2 pairs, a kept width of q and k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.attention import ElasticSplit, Scored
from stratavit.elastic.delta import Weights
from stratavit.elastic.plain import picked, rotated
from stratavit.elastic.site import Site, rotary_steps, rotary_width


def cuts_pairs(stock: Any) -> bool:
    """Whether q and k of a module of timm, given rotary positions, can be cut by pairs: no norm mixes these."""
    normed = not isinstance(getattr(stock, "q_norm", nn.Identity()), nn.Identity)
    width = stock.proj.in_features // stock.num_heads
    return hasattr(stock, "num_prefix_tokens") and not normed and width % 2 == 0


class ElasticRotary(ElasticSplit):
    """timm's `EvaAttention` and `AttentionRope` in a model that gives them rotary positions.

    Attributes:
        pairs: Numbers of the pairs, ``[P]``, the one that is dropped last first.
    """

    pairs: Tensor
    rotate_half: bool
    num_prefix_tokens: int

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        order = torch.arange(self.full_width // 2, device=self.proj.weight.device)
        self.register_buffer("pairs", order, persistent=False)

    def site(self, name: str) -> Site:
        """As of v alone, with the parameters of q and k among those that are cut."""
        site, biases = super().site(name), sum(bias is not None for _, bias in self.parts()[:2])
        fixed = site.fixed_params - (2 * site.dim + biases) * site.heads * site.qk_width
        steps = rotary_steps(self.full_width)
        return replace(site, steps=steps, rotary=True, qk_biases=biases, fixed_params=fixed)

    def columns(self, width: int) -> Tensor:
        """Coordinates of q and k, and of sines and cosines, that are kept at their width: ``[a]``."""
        kept = self.pairs[: width // 2]
        if self.rotate_half:
            return torch.cat([kept, kept + self.full_width // 2])
        return torch.stack([2 * kept, 2 * kept + 1], dim=-1).flatten()

    def scores_at(self, width: int) -> tuple[Tensor | None, list[tuple[Tensor, Tensor | None]]]:
        """Columns kept, and weight ``[H*a, C]`` and bias of q and k, where these have a width; None for all as is."""
        parts = list(self.parts()[:2])
        if width == self.full_width:
            return None, parts
        columns = self.columns(width)
        return columns, [(self._rows(weight, columns), self._rows(bias, columns)) for weight, bias in parts]

    def _rows(self, tensor: Tensor | None, columns: Tensor) -> Any:
        return None if tensor is None else tensor.unflatten(0, (self.heads, -1))[:, columns].flatten(0, 1)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of a `SplitAttention`."""
        kept = rotary_width(width, self.full_width)
        return super().numbers(width, weights) | {"qk_dim": kept} | ({"kept": True} if kept < self.full_width else {})

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of a `SplitAttention`, and the columns that it keeps."""
        width = weights.out_weight.shape[1] // self.heads
        columns, ((q, q_bias), (k, k_bias)) = self.scores_at(rotary_width(width, self.full_width))
        kept = {} if columns is None else {"kept": columns}
        cut = {"q.weight": q, "q.bias": q_bias, "k.weight": k, "k.bias": k_bias}
        return {**super().tensors(weights), **cut, **kept}

    def scored(self, x: Tensor, features: Tensor, rope: Tensor | None) -> Scored:
        """q and k at their width, rotated; shown to the observer at full width."""
        width = rotary_width(self.width, self.full_width)
        columns, parts = self.scores_at(width)
        q, k = (F.linear(x, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, N, a]
        if rope is not None:
            turns = picked(rope, columns)
            q, k = (rotated(x, turns, self.num_prefix_tokens, self.rotate_half).type_as(features) for x in (q, k))
        if self.observer is not None and width == self.full_width:
            self.observer.pairs(lambda: pair_products(q, k, self.rotate_half))
        return q, k, features[0], self.full_width**-0.5


@torch.no_grad()
def pair_products(q: Tensor, k: Tensor, half: bool) -> Tensor:
    """Products of what every two pairs add to the scores, summed over images, heads, queries and keys: ``[P, P]``.

    What is the same for all keys of a query is left out, as the softmax does not see it. The term of coordinate i is
    ``q_i k_i``, so the products of two coordinates are those of q times those of k; a pair adds up its two.

    Args:
        q, k: Rotated, ``[B, H, N, d]``.
        half: Pairs are coordinates i and i + d / 2, else 2 i and 2 i + 1.
    """
    q, k = q.detach().float(), k.detach().float()
    k = k - k.mean(dim=2, keepdim=True)
    products = ((q.mT @ q) * (k.mT @ k)).sum(dim=(0, 1), dtype=torch.float32) / q.shape[2]  # [d, d]
    if half:
        return products.unflatten(0, (2, -1)).unflatten(2, (2, -1)).sum(dim=(0, 2))
    return products.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum(dim=(1, 3))


def order_of_pairs(products: Tensor) -> Tensor:
    """The pairs, the one to drop last first: each time the one goes that moves the scores least, with those gone.

    Args:
        products: See `pair_products`, ``[P, P]``; the squared error without a set of pairs is the sum of their block.
    """
    rows, count = products.double().cpu(), len(products)
    left, gone, with_gone = set(range(count)), [], torch.zeros(count, dtype=torch.float64)
    while left:
        pair = min(left, key=lambda one: (float(rows[one, one] + 2 * with_gone[one]), -one))
        left.remove(pair)
        gone.append(pair)
        with_gone = with_gone + rows[pair]
    return torch.tensor(gone[::-1], device=products.device)
