"""Attention that runs any number of its heads, each as wide as ever: its coordinates are whole heads.

What `base` calls the heads of a site are here the channels of one head: the first w heads are the first w coordinates
of each of these d channels. So what sorts, compensates and counts coordinates serves whole heads as well.

Shape legend: B images, N tokens, C token width, H heads, d head_dim, w kept heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.attention import CoordinatesFirst, ElasticAttention, Part
from stratavit.elastic.delta import Weights
from stratavit.elastic.plain import attend
from stratavit.elastic.site import Site


class ElasticWholeHeads(CoordinatesFirst, ElasticAttention):
    """timm's `Attention` with any number of heads; small models have timm's own class with fewer heads.

    Nothing is turned: the function is kept by sorting heads, and q, k and v of those that stay are as they were. So q
    and k may be normalised (qk-norm), as all heads are by one norm.
    """

    attention = False  # sorted and measured as hidden channels are
    tied = False
    whole_heads = True
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.heads, self.full_width = self.full_width, self.heads  # d and H

    def cut_parts(self) -> tuple[Part, ...]:
        """All of them: q, k and v of a head leave together."""
        return self.parts()

    def site(self, name: str) -> Site:
        """See `ElasticSite.site`; every head is a unit."""
        steps = tuple(range(self.full_width + 1))
        return replace(super().site(name), steps=steps, qk_width=0, whole_heads=True)

    def cut_in(self, weight: Tensor, width: int) -> Tensor:
        """``[3*H*d, ...]`` to ``[3*w*d, ...]``."""
        return weight.unflatten(0, (3, self.full_width, self.heads))[:, :width].flatten(0, 2)

    def permute(self, order: Tensor) -> None:
        """Sorts the heads in place."""
        for part in self.parts():
            for tensor in part:
                if tensor is not None:
                    by_head = tensor.detach().unflatten(0, (self.full_width, self.heads))
                    tensor.copy_(by_head[order.to(tensor.device)].flatten(0, 1))
        columns = self.proj.weight.detach().unflatten(1, (self.full_width, self.heads))
        self.proj.weight.copy_(columns[:, order.to(columns.device)].flatten(1))

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of timm's `Attention` with fewer heads."""
        return {**super().numbers(width, weights), "num_heads": width, "head_dim": self.heads}

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """`proj` reads head after head again: ``[C, d*w]`` to ``[C, w*d]``."""
        found = super().tensors(weights)
        found["proj.weight"] = weights.out_weight.unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(1)
        return found

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `Attention`."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_now()
        features = F.linear(x, weights.in_weight, weights.in_bias).unflatten(-1, (3, -1, self.heads))  # [B, N, 3, w, d]
        q, k, v = features.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(q, k, v, attn_mask, None, None, self.attn_drop.p if self.training else 0.0, is_causal)
        by_channel = mixed.unflatten(-1, (-1, self.heads)).transpose(-1, -2).flatten(-2)  # [B, N, w*d] -> [B, N, d*w]
        return self.proj_drop(self.written(by_channel, weights))
