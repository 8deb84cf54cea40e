"""Attention and MLP modules that run any prefix of their channels from one set of weights.

They take the place of timm's `Attention` and `Mlp` inside a super-network and keep their parameter
names, so a super-network's state dict is an ordinary timm checkpoint. `weights_at` is the one place
that says what a module's weights are at a width; elastic execution and extraction both call it.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, m full hidden width, w kept width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from stratavit.compensation import GAIN, Moments, compensate
from stratavit.errors import StrataViTError

Compensation = Literal["none", "mean", "full"]


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


class Probe(NamedTuple):
    """Stands in for a module's weights while the effect of small changes of its width is measured."""

    weights: Weights  # at some width p
    gate: Tensor | None  # attention: factor of each coordinate of q, [p]


class ElasticSite(nn.Module):
    """Common ground of the two elastic modules.

    Attributes:
        width: Kept width of the next forward pass, set by the super-network.
        bypassed: The module adds nothing at all; set while its sensitivity is measured.
        compensation: ``full`` replaces dropped channels by what the kept ones predict, ``mean`` by their mean,
            ``none`` by nothing. ``full`` without `moments` is ``mean``.
        gain: Share of the output energy lost that ``full`` puts back, see `compensation.compensate`.
        channel_mean: Mean of the channels that `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``;
            empty before any calibration.
        moments: Second moments of the same channels, coordinate-major (coordinate, then head), so that a
            cut is a prefix of all heads at once.
        crossed: `channel_mean` and `moments` without the images of fold 0, and without those of fold 1; after
            calibration, for the list. Not saved.
        corrected: Width -> weight and bias of `out`, computed beforehand (`specialise`), with what they rest on. Not
            saved.
        probe: Weights that take the place of the module's own.
        observer: Set while statistics are collected.
    """

    heads: int
    full_width: int

    def __init__(self, channel_mean: Tensor) -> None:
        super().__init__()
        self.width = self.full_width
        self.compensation: Compensation = "none"
        self.gain = GAIN
        self.moments: Moments | None = None
        self.crossed: tuple[tuple[Tensor, Moments], ...] = ()
        self.probe: Probe | None = None
        self.corrected: dict[int, tuple[list[Any], tuple[Tensor, Tensor]]] = {}
        self._compensated: tuple[Moments | None, Any, tuple[Tensor, Tensor]] | None = None
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

    def out_by_coordinate(self) -> Tensor:
        """Weight of `out` as ``[C, d*H]``, coordinate-major: coordinate, then head."""
        return self.out_by_head().transpose(1, 2).flatten(1)

    def weights_at(self, width: int) -> Weights:
        """Weights of the prefix of `width` channels (per head), 0 < width <= full width."""
        in_weight, in_bias = self.in_weight(width)
        if width == self.full_width:
            return Weights(in_weight, in_bias, self.out.weight, self.out.bias)
        if self.compensation == "full" and width in self.corrected:
            return Weights(in_weight, in_bias, *self._specialised(width))
        if self.compensation == "full" and self.moments is not None:
            return Weights(in_weight, in_bias, *self._remembered(width))
        kept = self.out_by_head()[:, :, :width].flatten(1)  # [C, H, w] -> [C, H*w]
        return Weights(in_weight, in_bias, kept, self.out_bias_at(width))

    def _remembered(self, width: int) -> tuple[Tensor, Tensor]:
        """`compensated_out`, computed once per width as long as what it rests on stays and no gradient is asked.

        Changes in place are seen, except those that go around autograd's version counter (``weight.data``).
        """
        if any(t.is_inference() for t in self._rests_on()) or self._learns():
            return self.compensated_out(width, self.gain)
        key = (width, self.gain, self._versions())
        known = self._compensated
        if known is None or known[0] is not self.moments or known[1] != key:
            with torch.inference_mode(False), torch.no_grad():
                known = self._compensated = (self.moments, key, self.compensated_out(width, self.gain))
        return known[2]

    def specialise(self, width: int) -> None:
        """Keeps `compensated_out` at a width for as long as the weights stay as they are."""
        if self.compensation == "full" and self.moments is not None and 0 < width < self.full_width:
            with torch.inference_mode(False), torch.no_grad():
                self.corrected[width] = (self._versions(), self.compensated_out(width, self.gain))

    def forget_last(self) -> None:
        """Frees the corrected weights of the width that ran last."""
        self._compensated = None

    def _specialised(self, width: int) -> tuple[Tensor, Tensor]:
        """What `specialise` kept.

        Raises:
            StrataViTError: The weights have changed since, and the moments to follow them are gone.
        """
        versions, known = self.corrected[width]
        if versions == self._versions() and not self._learns():
            return known
        if self.moments is not None:
            return self._remembered(width)
        raise StrataViTError(
            f"width {width} was specialised for other weights (trained, moved, copied or cast since), and the moments "
            "are released; load the super-network again, move or cast it, then specialise"
        )

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._rests_on())

    def _rests_on(self) -> list[Tensor]:
        """What the second map is computed from."""
        return [t for t in (self.out.weight, self.out.bias, self.channel_mean) if t is not None]

    def _versions(self) -> list[Any]:
        return [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in self._rests_on()]

    def compensated_out(self, width: int, gain: float) -> tuple[Tensor, Tensor]:
        """Weight ``[C, H*w]`` and bias ``[C]`` of `out` with what the dropped channels did folded in."""
        with torch.autocast(self.out.weight.device.type, enabled=False):
            return self._solved(width, gain)

    def _solved(self, width: int, gain: float) -> tuple[Tensor, Tensor]:
        assert self.moments is not None
        if self.moments.factor.device != self.out.weight.device:
            self.moments = self.moments.to(self.out.weight.device)
        weight = self.out_by_coordinate().float()  # [C, d*H]
        mean = self.channel_mean.T.flatten().float()  # [d*H]
        kept, shift = compensate(weight, mean, self.moments, width * self.heads, gain)
        kept = kept.unflatten(1, (width, self.heads)).transpose(1, 2).flatten(1)  # [C, w*H] -> [C, H*w]
        bias = shift if self.out.bias is None else self.out.bias.float() + shift
        return kept.to(self.out.weight.dtype), bias.to(self.out.weight.dtype)

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
        weights = self.weights_at(self.width) if self.probe is None else self.probe.weights
        qkv = F.linear(x, weights.in_weight, weights.in_bias)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, w]
        if self.observer is not None:
            self.observer.features(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, w]
        if self.probe is not None and self.probe.gate is not None:
            q = q * self.probe.gate
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
        weights = self.weights_at(self.width) if self.probe is None else self.probe.weights
        hidden = self.drop1(self.act(F.linear(x, weights.in_weight, weights.in_bias)))  # [B, N, w]
        if self.observer is not None:
            self.observer.inputs_of_out(hidden)
        out = F.linear(hidden, weights.out_weight, weights.out_bias)
        if self.observer is not None:
            self.observer.outputs(out)
        return self.drop2(out)


def set_widths(elastic: Mapping[str, ElasticSite], widths: Mapping[str, int] | None) -> None:
    """Widths of the next pass; None is full width."""
    for name, module in elastic.items():
        module.width = module.full_width if widths is None else widths[name]
