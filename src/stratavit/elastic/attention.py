"""Attention that runs any head_dim: q, k and v are cut alike.

Shape legend: B images (or windows), N tokens, C token width, H heads, d full head_dim, w kept width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.base import AttentionTransform, ElasticSite, Weights, fold_heads
from stratavit.elastic.plain import attend, position_bias
from stratavit.elastic.site import Site, attention_steps

Part = tuple[nn.Parameter | Tensor, nn.Parameter | Tensor | None]


def head_width(stock: Any) -> int:
    """Full head_dim of any of timm's attention modules."""
    channels: int = stock.proj.in_features
    return channels // int(stock.num_heads)


class HeadsSite(ElasticSite):
    """What all attention modules share: where q, k and v lie in timm's several layouts."""

    attention = True
    num_heads: int
    qkv: Any
    proj: nn.Linear
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout

    def __init__(self, stock: Any) -> None:
        super().__init__(stock, stock.num_heads, head_width(stock))

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
            layers = (getattr(self, f"{name}_proj") for name in "qkv")
            q, k, v = ((layer.weight, layer.bias) for layer in layers)
            return q, k, v
        weights = self.qkv.weight.chunk(3)
        if self.qkv.bias is not None:
            biases: Any = self.qkv.bias.chunk(3)
        elif getattr(self, "q_bias", None) is not None:  # k has none: its mean cancels in the softmax
            biases = (self.q_bias, None, self.v_bias)
        else:
            biases = (None, None, None)
        q, k, v = zip(weights, biases, strict=True)
        return q, k, v

    def norms(self) -> Tensor:
        """L2 norms, see `ElasticSite.norms`: rows of q and k; for v rows and columns of `proj`."""
        shape = (self.heads, self.full_width)
        parts = self.parts() if self.tied else self.parts()[2:]
        squares = torch.stack([weight.detach().double().square().sum(dim=1).view(shape) for weight, _ in parts])
        squares[-1] += self.out_by_head().detach().double().square().sum(dim=0)
        return squares.sqrt()

    def fold(self, transform: AttentionTransform) -> None:
        """Applies a transform to q, k, v and `proj` in place."""
        for matrix, part in zip((transform.q, transform.k, transform.v), self.parts(), strict=True):
            for tensor in part:
                if tensor is not None and matrix is not None:
                    tensor.copy_(fold_heads(matrix, tensor.detach()))
        columns = self.proj.weight.detach().T  # [H*d, C]
        self.proj.weight.copy_(fold_heads(transform.o.transpose(-1, -2), columns.contiguous()).T)

    def _site(self, name: str, maps: int, biases: int, qk: int = 0) -> Site:
        channels, dim = self.heads * self.full_width, self.proj.out_features
        scaling = ((maps + 1) * dim + biases) * channels + (self.proj.bias is not None) * dim
        return Site(
            name,
            "attention",
            width=self.full_width,
            heads=self.heads,
            dim=dim,
            in_biases=biases,
            out_bias=self.proj.bias is not None,
            steps=attention_steps(self.full_width),
            maps=maps,
            qk_width=qk,
            fixed_params=self.fixed_params(scaling),
        )


class ElasticAttention(HeadsSite):
    """timm's `Attention` at any head_dim; at full width the same operations in the same order."""

    tied = True
    fused_attn: bool

    def site(self, name: str) -> Site:
        """What `cost` and the dropout list need to know."""
        return self._site(name, maps=3, biases=sum(bias is not None for _, bias in self.parts()))

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """`qkv` at a head_dim, q scaled so that the stock scale ``w**-0.5`` gives the dense ``d**-0.5``."""
        if width == self.full_width:
            return self.qkv.weight, self.qkv.bias
        scale = (width / self.full_width) ** 0.5

        def cut(x: Tensor) -> Tensor:  # [3*H*d, ...] -> [3*H*w, ...]
            kept = x.unflatten(0, (3, self.heads, self.full_width))[:, :, :width].flatten(1, 2)
            factor = kept.new_tensor([scale, 1.0, 1.0]).view(3, *[1] * (kept.dim() - 1))
            return (kept * factor).flatten(0, 1)

        return cut(self.qkv.weight), None if self.qkv.bias is None else cut(self.qkv.bias)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of timm's `Attention` at a head_dim."""
        in_bias, out_bias = weights.in_bias is not None, weights.out_bias is not None
        return {"num_heads": self.heads, "head_dim": width, "qkv_bias": in_bias, "proj_bias": out_bias}

    def tensors(self, width: int, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of timm's `Attention`."""
        names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
        return dict(zip(names, weights, strict=True))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `Attention`."""
        return self._run(x, attn_mask, is_causal=is_causal)

    def _run(self, x: Tensor, bias: Tensor | None, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`bias` and `mask` as in `plain.attend`."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_now()
        qkv = F.linear(x, weights.in_weight, weights.in_bias)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, w]
        if self.observer is not None:
            self.observer.features(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, w]
        if self.probe is not None and self.probe.gate is not None:
            q = q * self.probe.gate
        p = self.attn_drop.p if self.training else 0.0
        mixed = attend(q, k, v, bias, mask, None, p, is_causal)  # [B, N, H*w]
        return self.proj_drop(self.written(mixed, weights))


class ElasticWindows(ElasticAttention):
    """Swin's `WindowAttention`: relative positions and the masks of shifted windows are added to the scores."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """All windows of all images ``[B*windows, N, C]`` to the same; `mask` ``[windows, N, N]``."""
        return self._run(x, position_bias(self), mask)


class ElasticBeit(ElasticAttention):
    """BEiT's `Attention`: k has no bias, relative positions are added to the scores.

    timm's own class cannot be narrower than the tokens, so small models get a `plain.SplitAttention`.
    """

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """q, k and v at a head_dim, q scaled as in `ElasticAttention`."""
        scale = (width / self.full_width) ** 0.5
        (q, q_bias), (k, _), (v, v_bias) = self.parts()

        def cut(x: Tensor) -> Tensor:  # [H*d, ...] -> [H*w, ...]
            return x.unflatten(0, (self.heads, -1))[:, :width].flatten(0, 1)

        weight = torch.cat([cut(q) * scale, cut(k), cut(v)])
        assert q_bias is not None, "a BEiT without biases is refused"
        assert v_bias is not None
        bias = cut(q_bias) * scale
        return weight, torch.cat([bias, torch.zeros_like(bias), cut(v_bias)])

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of a `SplitAttention` whose widths are alike."""
        bias, out_bias = weights.in_bias is not None, weights.out_bias is not None
        numbers = {"num_heads": self.heads, "qk_dim": width, "v_dim": width, "scale": width**-0.5}
        return {**numbers, "biases": [bias, False, bias, out_bias]}

    def tensors(self, width: int, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of a `SplitAttention`."""
        q, k, v = weights.in_weight.chunk(3)
        q_bias, _, v_bias = (None, None, None) if weights.in_bias is None else weights.in_bias.chunk(3)
        ours = {"q.weight": q, "k.weight": k, "v.weight": v, "q.bias": q_bias, "v.bias": v_bias}
        return {**ours, "proj.weight": weights.out_weight, "proj.bias": weights.out_bias}

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `beit.Attention`."""
        return self._run(x, position_bias(self, shared_rel_pos_bias))
