"""Attention of which q, k and v are cut alike, but whose small layer timm's own class cannot be.

timm's classes are as wide as the tokens, so small models get a `plain.SplitAttention` whose widths are alike; what adds
relative positions to the scores is kept in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.attention import ElasticAttention, prefix_of_heads
from stratavit.elastic.delta import Weights


class ElasticBiased(ElasticAttention):
    """Attention with one layer for q, k and v, and a module `rel_pos` that returns what is added to the scores."""

    split = True

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; and normalised q and k cannot be rotated."""
        normed = not isinstance(getattr(stock, "q_norm", nn.Identity()), nn.Identity)
        return super().refusal(stock) or (("q_norm", "normalised q and k are not supported here") if normed else None)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of a `SplitAttention` whose widths are alike."""
        biases = [*(bias is not None for _, bias in self.parts()), weights.out_bias is not None]
        return {"num_heads": self.heads, "qk_dim": width, "v_dim": width, "scale": width**-0.5, "biases": biases}

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of a `SplitAttention`."""
        found: dict[str, Tensor | None] = {"proj.weight": weights.out_weight, "proj.bias": weights.out_bias}
        biases = (None,) * 3 if weights.in_bias is None else weights.in_bias.chunk(3)
        for name, weight, bias, (_, own) in zip("qkv", weights.in_weight.chunk(3), biases, self.parts(), strict=True):
            found |= {f"{name}.weight": weight, f"{name}.bias": None if own is None else bias}
        return found


class ElasticRelPos(ElasticBiased):
    """`RelPosAttention` of ViTs with relative positions, of every block or shared by all."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; `shared_rel_pos` ``[1, H, N, N]``."""
        return self._run(x, self.position_bias(shared_rel_pos))


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
        return self._run(x, self.position_bias(shared_rel_pos_bias))
