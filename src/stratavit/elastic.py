"""Attention and MLP modules that run any prefix of their channels from one set of weights.

They take the place of timm's `Attention` and `Mlp` inside a super-network and keep their parameter
names, so a super-network's state dict is an ordinary timm checkpoint. `weights_at` is the one place
that says what a module's weights are at a width; elastic execution and extraction both call it.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, m full hidden width, w kept width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

Compensation = Literal["none", "mean"]


class Weights(NamedTuple):
    """What a module computes with at some width: into its channels, then out of them."""

    in_weight: Tensor  # attention [3*H*w, C], MLP [w, C]
    in_bias: Tensor | None
    out_weight: Tensor  # attention [C, H*w], MLP [C, w]
    out_bias: Tensor | None


class Observer(Protocol):
    """Sees the features of a module as it runs; `statistics` collects moments through it."""

    def features(self, features: Tensor) -> None:
        """Attention: qkv ``[B, N, 3, H, w]`` (q before the attention scale). MLP: never called."""

    def inputs_of_out(self, features: Tensor) -> None:
        """Attention: head outputs ``[B, N, H*w]``. MLP: post-activations ``[B, N, w]``."""

    def outputs(self, outputs: Tensor) -> None:
        """What the module adds to the residual stream, ``[B, N, C]``, before any LayerScale."""


class ElasticSite(nn.Module):
    """Common ground of the two elastic modules.

    Attributes:
        width: Kept width of the next forward pass, set by the super-network.
        bypassed: The module adds nothing at all; set while its sensitivity is measured.
        compensation: ``mean`` replaces dropped channels by their mean, ``none`` by nothing.
        channel_mean: Mean of the channels that `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``;
            empty before any calibration.
        observer: Set while statistics are collected.
    """

    heads: int
    full_width: int

    def __init__(self, channel_mean: Tensor) -> None:
        super().__init__()
        self.width = self.full_width
        self.compensation: Compensation = "none"
        self.observer: Observer | None = None
        self.bypassed = False
        self.channel_mean: Tensor
        self.register_buffer("channel_mean", channel_mean, persistent=False)

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """The first linear map at a width."""
        raise NotImplementedError

    @property
    def out(self) -> nn.Linear:
        """The second linear map: `proj` or `fc2`."""
        raise NotImplementedError

    def out_by_head(self) -> Tensor:
        """Weight of `out` as ``[C, H, d]`` (one head for an MLP)."""
        return self.out.weight.unflatten(1, (self.heads, self.full_width))

    def weights_at(self, width: int) -> Weights:
        """Weights of the prefix of `width` channels (per head), 0 < width <= full width."""
        in_weight, in_bias = self.in_weight(width)
        if width == self.full_width:
            return Weights(in_weight, in_bias, self.out.weight, self.out.bias)
        kept = self.out_by_head()[:, :, :width].flatten(1)  # [C, H, w] -> [C, H*w]
        return Weights(in_weight, in_bias, kept, self.out_bias_at(width))

    def out_bias_at(self, width: int) -> Tensor | None:
        """Bias of `out` at a width: ``bias + W[:, w:] mean[w:]``, what the dropped channels add on average.

        Exact at full width. W is detached: in training the correction follows the weights without
        steering them. At width 0 without compensation the module adds nothing at all (paper).
        """
        if self.compensation == "none":
            return None if width == 0 else self.out.bias
        if width == self.full_width or self.channel_mean.numel() == 0:
            return self.out.bias
        dropped = self.out_by_head().detach()[:, :, width:].flatten(1)  # [C, H*(d-w)]
        constant = dropped @ self.channel_mean[:, width:].flatten().to(dropped)
        return constant if self.out.bias is None else self.out.bias + constant

    def constant(self, x: Tensor) -> Tensor:
        """Output at width 0 (or bypassed): a constant for every token, or zeros. x ``[B, N, C]``."""
        bias = None if self.bypassed else self.out_bias_at(0)
        zeros = torch.zeros_like(x)
        return zeros if bias is None else zeros + bias


class ElasticAttention(ElasticSite):
    """timm's `Attention` at any head_dim; at full width the same operations in the same order."""

    def __init__(self, attn: Attention) -> None:
        self.heads, self.full_width = attn.num_heads, attn.head_dim
        super().__init__(attn.qkv.weight.new_empty(0))
        self.qkv, self.attn_drop = attn.qkv, attn.attn_drop
        self.proj, self.proj_drop = attn.proj, attn.proj_drop
        self.fused_attn: bool = attn.fused_attn

    @property
    def out(self) -> nn.Linear:
        """`proj`."""
        return self.proj

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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; the arguments of timm's `Attention`."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_at(self.width)
        qkv = F.linear(x, weights.in_weight, weights.in_bias)
        qkv = qkv.unflatten(-1, (3, self.heads, self.width))  # [B, N, 3, H, w]
        if self.observer is not None:
            self.observer.features(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, w]
        p = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p, is_causal=is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, H, N, w] -> [B, N, H*w]
        if self.observer is not None:
            self.observer.inputs_of_out(mixed)
        out = F.linear(mixed, weights.out_weight, weights.out_bias)
        if self.observer is not None:
            self.observer.outputs(out)
        return self.proj_drop(out)


class ElasticMlp(ElasticSite):
    """timm's `Mlp` at any hidden width."""

    def __init__(self, mlp: Mlp) -> None:
        self.heads, self.full_width = 1, mlp.fc1.out_features
        super().__init__(mlp.fc1.weight.new_empty(0))
        self.fc1, self.act, self.drop1 = mlp.fc1, mlp.act, mlp.drop1
        self.fc2, self.drop2 = mlp.fc2, mlp.drop2

    @property
    def out(self) -> nn.Linear:
        """`fc2`."""
        return self.fc2

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """`fc1` at a hidden width: a view of its first rows."""
        return self.fc1.weight[:width], None if self.fc1.bias is None else self.fc1.bias[:width]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_at(self.width)
        hidden = self.drop1(self.act(F.linear(x, weights.in_weight, weights.in_bias)))  # [B, N, w]
        if self.observer is not None:
            self.observer.inputs_of_out(hidden)
        out = F.linear(hidden, weights.out_weight, weights.out_bias)
        if self.observer is not None:
            self.observer.outputs(out)
        return self.drop2(out)
