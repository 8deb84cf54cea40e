"""What attention and MLP modules have in common that run any prefix of their channels from one set of weights.

They take the place of timm's modules inside a super-network and keep their parameter names, so a super-network's state
dict is an ordinary timm checkpoint. `weights_at` is the one place that says what a module's weights are at a width;
elastic execution and extraction both call it.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, m full hidden width, w kept width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.compensation import (
    GAIN,
    Moments,
    PackedMoments,
    System,
    completed,
    project,
    solved_alone,
    system_of,
)
from stratavit.elastic.corrected import Corrected, stale
from stratavit.elastic.delta import Delta, Weights, added
from stratavit.elastic.exchanged import AttentionTransform, Compensation, Observer, Probe
from stratavit.elastic.projected import Projected, can_be_kept, extended
from stratavit.elastic.running import current_run

if TYPE_CHECKING:
    from stratavit.elastic.site import Site

Solved = tuple[System, Tensor]  # and its solution, [C, k]


class ElasticSite(nn.Module):
    """A module that runs any prefix of its channels. Subclasses say where these lie, what is small, and the pass.

    Attributes:
        attention: It is an attention module; else an MLP.
        tied: Attention of which q and k are cut along with v.
        split: Its small layer is a `plain.SplitAttention`, and timm's own module is a full one that nothing has cut.
        tensor_names: Names of `Weights` in the small layer, see `tensors`.
        whole_heads: Attention whose coordinates are whole heads; then `heads` is d, `full_width` is H.
        heads, full_width: H, and d or m.
        bypassed: The module adds nothing at all; set while its sensitivity is measured.
        compensation: ``full`` replaces dropped channels by what the kept ones predict, ``mean`` by their mean,
            ``none`` by nothing. ``full`` without `moments` is ``mean``.
        gain: Share of the output energy lost that ``full`` puts back, see `compensation.compensate`.
        channel_mean: Mean of the channels that `out` reads, ``[H, d]`` or ``[1, m]``; empty before any calibration.
        moments: Second moments of the same channels, coordinate-major (coordinate, then head), so that a
            cut is a prefix of all heads at once.
        delta: What recovery of all sizes has learned; added to the weights the more, the narrower the module is.
        crossed: `channel_mean` and packed `moments` without the images of fold 0, and without those of fold 1; after
            calibration, for the list. Not saved.
        corrected: Width -> what `specialise` computed. Not saved.
        projected: What all compensated widths share, once one was computed; see `projected`. Not saved.
        probe: Weights that take the place of the module's own.
        observer: Set while statistics are collected.
    """

    attention = False
    tied = False
    split = False
    whole_heads = False
    tensor_names: tuple[str, str, str, str]
    heads: int
    full_width: int
    channel_mean: Tensor

    def __init__(self, stock: nn.Module, heads: int, full_width: int) -> None:
        super().__init__()
        self.heads, self.full_width = heads, full_width
        self._adopt(stock)
        self.compensation: Compensation = "none"
        self.gain = GAIN
        self.moments: Moments | None = None
        self.delta: Delta | None = None
        self.crossed: tuple[tuple[Tensor, PackedMoments], ...] = ()
        self.probe: Probe | None = None
        self.corrected: dict[int, Corrected] = {}
        self.projected: Projected | None = None
        self.observer: Observer | None = None
        self.bypassed = False
        self.register_buffer("channel_mean", self.out.weight.new_empty(0), persistent=False)

    def _adopt(self, stock: nn.Module) -> None:
        """Takes over a stock module's parts and plain attributes under their names, but no methods of its own."""
        for name, value in vars(stock).items():
            if not name.startswith("_") and name != "training" and not callable(getattr(type(stock), name, None)):
                setattr(self, name, value)
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in stock._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in stock._non_persistent_buffers_set)

    # ---- what a subclass says, besides `forward` (through `weights_now`, `written` and `constant`) ------------------

    @classmethod
    def refusal(cls, stock: nn.Module) -> tuple[str, str] | None:
        """The part of a stock module that does not allow it to be cut, and why; None if it can be."""
        raise NotImplementedError

    def site(self, name: str) -> Site:
        """What `cost` and the dropout list need to know."""
        raise NotImplementedError

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the map into the channels at a width, but for `delta`; see `in_weight_at`."""
        raise NotImplementedError

    def cut_in(self, weight: Tensor, width: int) -> Tensor:
        """A weight or bias of the map into the channels, ``[n*H*d, ...]``, at a width: ``[n*H*w, ...]``."""
        return weight.unflatten(0, (-1, self.full_width))[:, :width].flatten(0, 1)

    @property
    def out(self) -> nn.Linear:
        """The map out of the channels: `proj` or `fc2`."""
        raise NotImplementedError

    def fold(self, transform: AttentionTransform) -> None:
        """Attention: applies a change of coordinates in place."""
        raise NotImplementedError

    def permute(self, order: Tensor) -> None:
        """MLP: sorts the hidden units in place."""
        raise NotImplementedError

    def norms(self) -> Tensor:
        """L2 norm of each coordinate's weights: attention ``[3, H, d]`` (v alone ``[1, H, d]``), MLP ``[1, 1, m]``."""
        raise NotImplementedError

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of the small layer at a width, see `layers.describe_layer`."""
        raise NotImplementedError

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small layer that are cut, under its names; None for a bias that is not there."""
        return dict(zip(self.tensor_names, weights, strict=True))

    # ---- weights at a width -----------------------------------------------------------------------------------------

    def whole_out(self) -> Tensor:
        """Weight of `out`, head after head: ``[C, H*d]``."""
        return self.out.weight

    def out_by_head(self) -> Tensor:
        """Weight of `out` as ``[C, H, d]`` (one head for an MLP)."""
        return self.out.weight.unflatten(1, (self.heads, self.full_width))

    def out_by_coordinate(self) -> Tensor:
        """Weight of `out` as ``[C, d*H]``, coordinate-major: coordinate, then head."""
        return self.out_by_head().transpose(1, 2).flatten(1)

    @property
    def width(self) -> int:
        """Kept width of the call that runs, see `running`; full width outside of one."""
        return current_run().widths.get(self, self.full_width)

    def weights_at(self, width: int) -> Weights:
        """Weights of the prefix of `width` channels (per head), 0 < width <= full width, computed from what is there.

        Raises:
            StrataViTError: They were computed by `specialise`, and the weights have changed since.
        """
        return Weights(*self.in_weight_at(width), *self.outs_at([width])[0])

    def in_weight_at(self, width: int, like: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the map into the channels at a width, changed by `delta` as at the width `like`."""
        weight, bias = self.in_weight(width)
        share = self._share(width if like is None else like)
        if self.delta is None or not share:
            return weight, bias
        changes = [None if x is None else self.cut_in(x, width) for x in self.delta.parts()[:2]]
        changed = added(weight, share, changes[0])
        assert changed is not None
        return changed, added(bias, share, changes[1])

    def _share(self, width: int) -> float:
        """How much of `delta` is added at a width: from 0 at the full one to 1 where nothing is left."""
        return 1 - width / self.full_width

    def _changed(self, width: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[C, H*w]`` and bias of `out` at a width, changed by `delta`."""
        if self.delta is None:
            return weight, bias
        _, _, change, shift = self.delta.parts()
        kept = change.unflatten(1, (self.heads, self.full_width))[:, :, :width].flatten(1)  # [C, H*d] -> [C, H*w]
        share = self._share(width)
        return weight + (share * kept).to(weight.dtype), added(bias, share, shift)

    def outs_at(
        self, widths: Sequence[int], solved: Sequence[Solved] | None = None
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of `out` at widths, see `weights_at`; those that are compensated share a product.

        `solved`: of `systems` at `to_solve` of these widths, where that was done for several modules at a time.
        """
        cut = [width for width in widths if width < self.full_width]
        found: dict[int, tuple[Tensor, Tensor | None]] = {self.full_width: (self.whole_out(), self.out.bias)}
        solving = self.to_solve(widths)
        if solving:
            found |= zip(solving, self.compensated_outs(solving, solved), strict=True)
        for width in cut:
            if width in found:
                continue
            if self.compensation == "full" and width in self.corrected:
                found[width] = self.corrected[width].checked(self._basis(), width)
            else:
                kept = self.out_by_head()[:, :, :width].flatten(1)  # [C, H, w] -> [C, H*w]
                found[width] = self._changed(width, kept, self.out_bias_at(width))
        return [found[width] for width in widths]

    def weights_now(self) -> Weights:
        """Weights of the call that runs: the probe's, else those at its width.

        The second map is taken from the run where that has fixed it, else from `specialise`.
        """
        if self.probe is not None:
            return self.probe.weights
        run, width = current_run(), self.width
        known = run.fixed.get(self)
        if known is None and self.compensation == "full" and width in self.corrected and not self._learns():
            known = self.corrected[width].unless_changed(self._basis())
            if known is None and self.moments is None:
                raise stale(width)
        return self.weights_at(width) if known is None else Weights(*self.in_weight_at(width), *known)

    def to_solve(self, widths: Sequence[int]) -> list[int]:
        """Those of widths at which second moments compensate what is cut."""
        full = self.compensation == "full" and self.moments is not None
        return [width for width in widths if full and 0 < width < self.full_width]

    def fixed_out(self, width: int, solved: Sequence[Solved] | None = None) -> tuple[Tensor, Tensor] | None:
        """Compensated weight and bias of `out`, apart from any gradient; None where there is nothing to compute."""
        if not self.to_solve([width]):
            return None
        with torch.no_grad():
            return self.compensated_outs([width], solved)[0]

    def specialise(self, width: int) -> None:
        """Keeps `fixed_out` at a width for as long as the weights stay as they are."""
        with torch.inference_mode(False):
            pair = self.fixed_out(width)
        if pair is not None:
            self.corrected[width] = Corrected(pair, self._basis())

    def forget(self) -> None:
        """Drops second moments and what was computed from them."""
        self.release_moments()
        self.corrected.clear()

    def release_moments(self) -> None:
        """Drops second moments, and keeps what `specialise` computed from them."""
        self.moments, self.crossed, self.projected = None, (), None

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._basis())

    def _basis(self) -> list[Tensor]:
        """What the second map is computed from, besides the moments."""
        learned = () if self.delta is None else self.delta.parts()[2:]
        return [t for t in (self.out.weight, self.out.bias, self.channel_mean, *learned) if t is not None]

    def storages(self) -> set[int]:
        """Addresses of all that it holds, of which a small model must have no part."""
        pairs = [tensor for one in self.corrected.values() for tensor in one.pair]
        return {t.untyped_storage().data_ptr() for t in (*self.parameters(), *self.buffers(), *pairs)}

    def compensated_outs(
        self, widths: Sequence[int], solved: Sequence[Solved] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Weight ``[C, H*w]`` and bias ``[C]`` of `out` at widths, with what the dropped channels did, and `delta`.

        `solved`: of `systems` at these widths, if that was done already.
        """
        found = []
        with torch.autocast(self.out.weight.device.type, enabled=False):
            weight, mean = self.out_by_coordinate().float(), self.channel_mean.T.flatten().float()  # [C, d*H], [d*H]
            pairs = map(solved_alone, self.systems(widths, weight)) if solved is None else solved
            for width, (system, kept) in zip(widths, pairs, strict=True):
                assert self.moments is not None
                kept, shift = completed(weight, mean, self.moments, system, kept, self.gain)
                kept = kept.unflatten(1, (width, self.heads)).transpose(1, 2).flatten(1)  # [C, w*H] -> [C, H*w]
                own = shift if self.out.bias is None else self.out.bias.float() + shift
                weights, bias = self._changed(width, kept.to(self.out.weight.dtype), own.to(self.out.weight.dtype))
                assert bias is not None
                found.append((weights, bias))
        return found

    def systems(self, widths: Sequence[int], weight: Tensor | None = None) -> list[System]:
        """What is to be solved for `compensated_outs`; all widths share a product.

        `weight`: of `out` by coordinate in float32, where that is there already.
        """
        assert self.moments is not None
        out = self.out.weight
        if self.moments.factor.device != out.device:
            with torch.inference_mode(False):  # gradients may pass them later
                self.moments = self.moments.to(out.device)
        with torch.autocast(out.device.type, enabled=False):
            weight = self.out_by_coordinate().float() if weight is None else weight
            projected = self._project(weight, self.moments.factor, max(widths) * self.heads)
            return [system_of(weight, self.moments, width * self.heads, projected) for width in widths]

    def _project(self, weight: Tensor, factor: Tensor, keep: int) -> Tensor:
        """`project` of the weight of `out` by coordinate, ``[C, d*H]``; kept where it can be."""
        if not can_be_kept(self.out.weight):
            self.projected = None
            return project(weight, factor, keep)
        self.projected = known = extended(self.projected, self.out.weight, factor, weight, keep)
        return known.columns

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

    def bias_alone(self) -> Tensor | None:
        """What the module adds at width 0, ``[C]``; None for nothing."""
        return added(self.out_bias_at(0), 1.0, None if self.delta is None else self.delta.parts()[3])

    def written(self, features: Tensor, weights: Weights) -> Tensor:
        """Output of `out`, ``[B, N, H*w]`` to ``[B, N, C]``, shown to the observer."""
        if self.observer is not None:
            self.observer.inputs_of_out(features)
        out = F.linear(features, weights.out_weight, weights.out_bias)
        if self.observer is not None:
            self.observer.outputs(out)
        return out

    def constant(self, x: Tensor) -> Tensor:
        """Output at width 0 (or bypassed): a constant for every token, or zeros. x ``[B, N, C]``."""
        bias = None if self.bypassed else self.bias_alone()
        zeros = torch.zeros_like(x)
        return zeros if bias is None else zeros + bias
