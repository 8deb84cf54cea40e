"""Attention whose q and k stay whole while v and `proj` are cut to any width.

Normalisation of q and k (qk-norm), rotary positions and cosine attention do not allow q and k to be turned, so the
width of such a site is that of v. Small models get a `plain.SplitAttention`.

Shape legend: B images (or windows), N tokens, C token width, H heads, d full head_dim, w kept width of v.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stratavit.elastic.attention import HeadsSite
from stratavit.elastic.base import Weights
from stratavit.elastic.plain import attend, position_bias, scores_ready
from stratavit.elastic.site import Site


class ElasticSplit(HeadsSite):
    """timm's `Attention` with qk-norm, `EvaAttention` and `AttentionRope`, v at any width."""

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; shared heads of k and v are not supported."""
        shared = "v_proj", "several heads share one head of k and v (grouped-query attention)"
        return super().refusal(stock) or (shared if getattr(stock, "num_kv_groups", 1) != 1 else None)

    def site(self, name: str) -> Site:
        """What `cost` and the dropout list need to know."""
        return self._site(name, maps=1, biases=int(self.parts()[2][1] is not None), qk=self.full_width)

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """v at a width."""
        weight, bias = self.parts()[2]

        def cut(x: Tensor) -> Tensor:  # [H*d, ...] -> [H*w, ...]
            return x if width == self.full_width else x.unflatten(0, (self.heads, -1))[:, :width].flatten(0, 1)

        return cut(weight), None if bias is None else cut(bias)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of a `SplitAttention`."""
        biases = [bias is not None for _, bias in self.parts()[:2]]
        biases += [weights.in_bias is not None, weights.out_bias is not None]
        scale = self.full_width**-0.5
        return {"num_heads": self.heads, "qk_dim": self.full_width, "v_dim": width, "scale": scale, "biases": biases}

    def tensors(self, width: int, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of a `SplitAttention`."""
        (q, q_bias), (k, k_bias), _ = self.parts()
        whole = {"q.weight": q, "q.bias": q_bias, "k.weight": k, "k.bias": k_bias}
        return {**whole, **dict(zip(("v.weight", "v.bias", "proj.weight", "proj.bias"), weights, strict=True))}

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's modules, see `plain.SplitAttention`."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_now()
        v = F.linear(x, weights.in_weight, weights.in_bias).unflatten(-1, (1, self.heads, -1))  # [B, N, 1, H, w]
        if self.observer is not None:
            self.observer.features(v)
        v = v.squeeze(2).transpose(1, 2)  # [B, H, N, w]
        q, k = (F.linear(x, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.parts()[:2])
        q, k, scale = scores_ready(self, q, k, v, self.full_width**-0.5, rope)
        p = self.attn_drop.p if self.training else 0.0
        mixed = attend(q, k, v, position_bias(self, attn_mask), mask, scale, p, is_causal)  # [B, N, H*w]
        return self.proj_drop(self.written(mixed, weights))


class ElasticCosine(ElasticSplit):
    """Swin-V2's `WindowAttention`: cosine attention, relative positions from a small MLP."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """All windows of all images ``[B*windows, N, C]`` to the same; `mask` ``[windows, N, N]``."""
        return super().forward(x, mask=mask)
