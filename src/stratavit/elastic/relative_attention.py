"""Attention with relative positions, which are added to the scores of two tokens; each as timm's module has them.

Shape legend: B images (or windows), N tokens, C token width, H heads, w kept width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from stratavit.elastic.attention import ElasticAttention, ElasticBiased, ElasticSplit, prefix_of_heads
from stratavit.elastic.plain import decomposed_bias
from stratavit.elastic.position_bias import position_bias


class ElasticWindows(ElasticAttention):
    """Swin's `WindowAttention`: relative positions and the masks of shifted windows are added to the scores."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """All windows of all images ``[B*windows, N, C]`` to the same; `mask` ``[windows, N, N]``."""
        return self._run(x, position_bias(self), mask)


class ElasticRelPos(ElasticBiased):
    """`RelPosAttention` of ViTs with relative positions, of every block or shared by all."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; `shared_rel_pos` ``[1, H, N, N]``."""
        return self._run(x, position_bias(self, shared_rel_pos))


class ElasticBeit(ElasticBiased):
    """BEiT's `Attention`: k has no bias, relative positions come from a table."""

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """q, k and v at a head_dim, q scaled as in `ElasticAttention`."""
        scale = (width / self.full_width) ** 0.5
        (q, q_bias), (k, _), (v, v_bias) = self.parts()
        assert q_bias is not None, "a BEiT without biases is refused"
        assert v_bias is not None
        q, k, v, q_bias, v_bias = (prefix_of_heads(x, self.heads, width) for x in (q, k, v, q_bias, v_bias))
        bias = q_bias * scale
        return torch.cat([q * scale, k, v]), torch.cat([bias, torch.zeros_like(bias), v_bias])

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `beit.Attention`."""
        return self._run(x, position_bias(self, shared_rel_pos_bias))


class ElasticCosine(ElasticSplit):
    """`WindowAttention` of both Swin-V2 of timm: cosine attention, relative positions from a small MLP."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """All windows of all images ``[B*windows, N, C]`` to the same; `mask` ``[windows, N, N]``."""
        return super().forward(x, mask=mask)


class ElasticMap(ElasticSplit):
    """SAM's attention: tokens are a map, and relative positions are multiplied by q."""

    reason = "relative positions, which are multiplied by q, are the same for all heads"

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; rotary positions are not supported."""
        rotary = "rope", "rotary positions of maps are not supported"
        return super().refusal(stock) or (None if stock.rope is None else rotary)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """All windows of all images ``[B*windows, H, W, C]`` to the same."""
        own: Any = self
        sides = x.shape[1:3]
        bias = partial(decomposed_bias, rows=own.rel_pos_h, columns=own.rel_pos_w, height=sides[0], width=sides[1])
        return self._run(x.flatten(1, 2), bias if own.use_rel_pos else None).unflatten(1, sides)
