"""Attention that runs any head_dim: q, k and v cut alike, or v alone where q and k stay uncut.

Normalisation of q and k (qk-norm), rotary positions and cosine attention do not allow q and k to be turned; the width
of such a site is that of v, and small models get a `plain.SplitAttention`. With rotary positions see `rotary`, with
relative ones `relative_attention`.

Shape legend: B images (or windows), N tokens, C token width, H heads, d full head_dim, w kept width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.delta import Weights
from stratavit.elastic.exchanged import AttentionTransform, fold_heads
from stratavit.elastic.plain import attend, cosines, rotated
from stratavit.elastic.position_bias import position_bias
from stratavit.elastic.site import Site, attention_steps

Part = tuple[nn.Parameter | Tensor, nn.Parameter | Tensor | None]
Scored = tuple[Tensor, Tensor, Tensor, float | None]  # q, k, v, and the factor of the scores; None is w**-0.5


def prefix_of_heads(x: Tensor, heads: int, width: int) -> Tensor:
    """The first rows of every head: ``[H*d, ...]`` to ``[H*w, ...]``."""
    return x.unflatten(0, (heads, -1))[:, :width].flatten(0, 1)


class HeadsSite(ElasticSite):
    """What all attention modules share: where q, k and v lie in timm's several layouts, and the pass."""

    attention = True
    num_heads: int
    qkv: Any
    proj: nn.Linear
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout

    def __init__(self, stock: Any) -> None:
        heads = stock.heads if hasattr(stock, "heads") else stock.num_heads
        super().__init__(stock, heads, stock.proj.in_features // heads)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """The norm before `proj` and the gate mix what should be cut."""
        if not isinstance(getattr(stock, "norm", nn.Identity()), nn.Identity):
            return "norm", "the norm between the heads and proj mixes channels (scale norm)"
        if getattr(stock, "gate", None) is not None:
            return "gate", "the elementwise gate on the heads' output does not allow v to be rotated"
        return None

    @property
    def out(self) -> nn.Linear:
        """`proj`."""
        return self.proj

    def parts(self) -> tuple[Part, Part, Part]:
        """Weight ``[H*d, C]`` and bias ``[H*d]`` of q, k and v: views, so that changes in place reach the weights."""
        if self.qkv is None:
            q, k, v = ((layer.weight, layer.bias) for layer in (getattr(self, f"{name}_proj") for name in "qkv"))
            return q, k, v
        biases: Any = (None, None, None)
        if self.qkv.bias is not None:
            biases = self.qkv.bias.chunk(3)
        elif getattr(self, "q_bias", None) is not None:  # k has none: its mean cancels in the softmax
            biases = (self.q_bias, None, self.v_bias)
        q, k, v = zip(self.qkv.weight.chunk(3), biases, strict=True)
        return q, k, v

    def cut_parts(self) -> tuple[Part, ...]:
        """Those that are cut: all of them, or v alone."""
        return self.parts() if self.tied else self.parts()[2:]

    def site(self, name: str) -> Site:
        """See `ElasticSite.site`."""
        channels, dim, out_bias = self.heads * self.full_width, self.proj.out_features, self.proj.bias is not None
        maps, biases = len(self.cut_parts()), sum(bias is not None for _, bias in self.cut_parts())
        cut_params = ((maps + 1) * dim + biases) * channels + out_bias * dim
        return Site(
            name,
            "attention",
            width=self.full_width,
            heads=self.heads,
            dim=dim,
            in_biases=biases,
            out_bias=out_bias,
            steps=attention_steps(self.full_width),
            maps=maps,
            qk_width=0 if self.tied else self.full_width,
            fixed_params=sum(parameter.numel() for parameter in self.parameters()) - cut_params,
        )

    def norms(self) -> Tensor:
        """L2 norms, see `ElasticSite.norms`: rows of q and k; for v rows and columns of `proj`."""
        rows = [weight.detach().double().square().sum(dim=1) for weight, _ in self.cut_parts()]
        squares = torch.stack(rows).unflatten(1, (self.heads, self.full_width))
        squares[-1] += self.out_by_head().detach().double().square().sum(dim=0)
        return squares.sqrt()

    def fold(self, transform: AttentionTransform) -> None:
        """Applies a transform to q, k, v and `proj` in place."""
        for matrix, part in zip((transform.q, transform.k, transform.v), self.parts(), strict=True):
            for tensor in part:
                if tensor is not None and matrix is not None:
                    tensor.copy_(fold_heads(matrix, tensor.detach()))
        columns = self.whole_out().detach().T  # [H*d, C]
        folded = fold_heads(transform.o.transpose(-1, -2), columns.contiguous()).T
        self.out_by_head().copy_(folded.unflatten(1, (self.heads, self.full_width)))

    def scored(self, x: Tensor, features: Tensor, rope: Tensor | None) -> Scored:
        """What attention is computed from, each ``[B, H, N, ...]``.

        Args:
            x: Tokens ``[B, N, C]``.
            features: The parts that are cut, ``[3 or 1, B, H, N, w]``.
            rope: Rotary positions.
        """
        raise NotImplementedError

    def _run(
        self,
        x: Tensor,
        bias: Tensor | Callable[[Tensor], Tensor] | None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """`bias` and `mask` as in `plain.attend`; `bias` may depend on q."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_now()
        features = F.linear(x, weights.in_weight, weights.in_bias)
        features = features.unflatten(-1, (3 if self.tied else 1, self.heads, -1))  # [B, N, 3 or 1, H, w]
        if self.observer is not None:
            self.observer.features(features)
        q, k, v, scale = self.scored(x, features.permute(2, 0, 3, 1, 4), rope)
        bias = bias(q) if callable(bias) else bias
        p = self.attn_drop.p if self.training else 0.0
        mixed = attend(q, k, v, bias, mask, scale, p, is_causal)  # [B, N, H*w]
        return self.proj_drop(self.written(mixed, weights))


class CoordinatesFirst(HeadsSite):
    """Attention whose `proj` reads coordinate after coordinate, each of all heads."""

    def out_by_head(self) -> Tensor:
        """Weight of `proj`, ``[C, d*H]`` to ``[C, H, d]``."""
        return self.proj.weight.unflatten(1, (self.full_width, self.heads)).transpose(1, 2)

    def whole_out(self) -> Tensor:
        """The same, head after head: ``[C, H*d]``."""
        return self.out_by_head().flatten(1)


class ElasticAttention(HeadsSite):
    """timm's `Attention` at any head_dim; at full width the same operations in the same order."""

    tied = True
    tensor_names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """`qkv` at a head_dim, q scaled so that the stock scale ``w**-0.5`` amounts to the dense ``d**-0.5``."""
        if width == self.full_width:
            return self.qkv.weight, self.qkv.bias
        bias = self.qkv.bias
        return self.cut_in(self.qkv.weight, width), None if bias is None else self.cut_in(bias, width)

    def cut_in(self, weight: Tensor, width: int) -> Tensor:
        """``[3*H*d, ...]`` to ``[3*H*w, ...]``, the part of q scaled."""
        q, k, v = prefix_of_heads(weight, 3 * self.heads, width).chunk(3)
        return torch.cat([q * (width / self.full_width) ** 0.5, k, v])

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of timm's `Attention` at a head_dim."""
        in_bias, out_bias = weights.in_bias is not None, weights.out_bias is not None
        return {"num_heads": self.heads, "head_dim": width, "qkv_bias": in_bias, "proj_bias": out_bias}

    def scored(self, x: Tensor, features: Tensor, rope: Tensor | None) -> Scored:
        """As they are, but for the probe's gate of q."""
        q, k, v = features.unbind(0)
        if self.probe is not None and self.probe.gate is not None:
            q = q * self.probe.gate
        return q, k, v, None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `Attention`."""
        return self._run(x, attn_mask, is_causal=is_causal)


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


class ElasticSplit(HeadsSite):
    """timm's `Attention` with qk-norm, `EvaAttention` and `AttentionRope`: v and `proj` at any width.

    Of `rotary.ElasticRotary`, q and k are cut, too.

    Attributes:
        reason: Why q and k are not cut.
    """

    reason = "qk-norm or cosine attention; timm has one class for these and for EVA"

    split = True
    tensor_names = ("v.weight", "v.bias", "proj.weight", "proj.bias")

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; shared heads of k and v are not supported."""
        shared = "v_proj", "several heads share one head of k and v (grouped-query attention)"
        return super().refusal(stock) or (shared if getattr(stock, "num_kv_groups", 1) != 1 else None)

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """v at a width."""
        weight, bias = self.parts()[2]
        if width == self.full_width:
            return weight, bias
        cut = prefix_of_heads(weight, self.heads, width)
        return cut, None if bias is None else prefix_of_heads(bias, self.heads, width)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of a `SplitAttention`."""
        biases = [bias is not None for bias in (*(bias for _, bias in self.parts()), weights.out_bias)]
        scale = self.full_width**-0.5
        return {"num_heads": self.heads, "qk_dim": self.full_width, "v_dim": width, "scale": scale, "biases": biases}

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of a `SplitAttention`."""
        (q, q_bias), (k, k_bias), _ = self.parts()
        uncut = {"q.weight": q, "q.bias": q_bias, "k.weight": k, "k.bias": k_bias}
        return {**uncut, **super().tensors(weights)}

    def scored(self, x: Tensor, features: Tensor, rope: Tensor | None) -> Scored:
        """q and k at full width, normalised and rotated."""
        own: Any = self
        v, scale = features[0], self.full_width**-0.5
        q, k = (F.linear(x, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.parts()[:2])
        if getattr(self, "q_norm", None) is not None:
            q, k = own.q_norm(q), own.k_norm(k)
        if rope is not None:
            q, k = (rotated(x, rope, own.num_prefix_tokens, own.rotate_half).type_as(v) for x in (q, k))
        if getattr(self, "logit_scale", None) is not None:
            q, k, scale = cosines(q, k, own.logit_scale)
        return q, k, v, scale

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's modules, see `plain.SplitAttention`."""
        return self._run(x, position_bias(self, attn_mask), mask, is_causal, rope)
