"""What one more unit brings to a network that is already cut, for all modules from one backward pass.

At a cut network the gradient of the distance to the dense model tells the first-order effect of
every small change of width at once: ``<d distance / d W, W(w + step) - W(w)>``, with W(w) the compensated weights at a
width, padded with zeros.

Shape legend: B images, C token width, H heads, p width of a probe, w kept width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.distance import distance
from stratavit.elastic.base import ElasticSite, Probe, Weights, run_at
from stratavit.elastic.site import Site
from stratavit.models.cost import CostModel
from stratavit.models.families import stages
from stratavit.utils.model import classes_of, model_device, model_dtype


@contextmanager
def crossed(model: nn.Module, fold: int) -> Iterator[None]:
    """The sites are compensated without the images of a fold, inside."""
    sites = [module for module in model.modules() if isinstance(module, ElasticSite)]
    kept = [(site, site.channel_mean, site.moments) for site in sites]
    try:
        for site in sites:
            if site.crossed:
                weight = site.out.weight  # the model may have been moved since
                site.crossed = tuple((m.to(weight), moments.to(weight.device)) for m, moments in site.crossed)
                site.channel_mean, site.moments = site.crossed[fold]
        yield
    finally:
        for site, mean, moments in kept:
            site.channel_mean, site.moments = mean, moments


@contextmanager
def probing(elastic: Mapping[str, ElasticSite], probes: Mapping[str, Probe]) -> Iterator[None]:
    """The sites run with the probes inside."""
    try:
        for name, module in elastic.items():
            module.probe = probes[name]
        yield
    finally:
        for module in elastic.values():
            module.probe = None


class Measurement(NamedTuple):
    """What a pass through a cut network tells.

    Attributes:
        distance: Mean distance to the dense model.
        drift: Mean of what the dense model's head reads minus the small one's, ``[C]`` float64.
        effects: By how much the distance falls per MAC given to each site, to first order; empty if not asked for.
    """

    distance: float
    drift: Tensor
    effects: dict[str, float]


class Reference:
    """Images with the dense model's answers to them; cut networks are measured against these.

    Args:
        model: In eval mode, its weights frozen.
        sites: Its sites.
        batches: Images ``[B, 3, H, W]``.
        dense_outputs: What is known of the dense model's answers; new ones are added.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Iterable[Tensor],
        dense_outputs: DenseOutputs | None = None,
    ) -> None:
        self.model, self.sites = model, sites
        self.elastic: dict[str, Any] = {site.name: model.get_submodule(site.name) for site in sites}
        dense_outputs = DenseOutputs() if dense_outputs is None else dense_outputs  # an empty one is falsy
        self._batches = [batch.to(model_device(model), model_dtype(model)) for batch in batches]
        self.count = sum(len(batch) for batch in self._batches)
        self._dense: list[Tensor] = []
        pooled: list[Tensor] = []
        with torch.no_grad(), run_at(self.elastic, None):
            for batch in self._batches:
                logits, features = dense_outputs.of(batch, self._pass)
                self._dense.append(logits)
                pooled.append(_sum(features))
        self._pooled = torch.stack(pooled).sum(dim=0)

    def _pass(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and what the head reads, ``[B, C]``, without gradient."""
        parts = stages(self.model)
        x = parts.through(parts.stem(batch))
        return parts.tail(x), parts.pool(x.detach())

    def forward(self, widths: Mapping[str, int], differentiate: bool = False) -> Measurement:
        """Distance and drift of the network at `widths`."""
        classes = classes_of(self.model)
        total, pooled = 0.0, torch.zeros_like(self._pooled)
        with run_at(self.elastic, widths, fixed=not differentiate):
            for batch, dense in zip(self._batches, self._dense, strict=True):
                with torch.set_grad_enabled(differentiate):
                    logits, features = self._pass(batch)
                    value = distance(logits, dense, classes)
                if differentiate:
                    value.backward()
                total, pooled = total + float(value.detach()), pooled + _sum(features)
        return Measurement(total / self.count, (self._pooled - pooled) / self.count, {})

    def effects(self, cost: CostModel, widths: Mapping[str, int]) -> Measurement:
        """The same, and the effect of giving each site more: central difference over one step up and one down.

        A site of a single unit has no step and is left out.

        Args:
            cost: Of the model; an effect is per unit of its `price`.
            widths: Every width a unit's end above 0.
        """
        ladder = {site.name: neighbours(site, widths[site.name], cost) for site in self.sites}
        probes = {name: make_probe(m, widths[name], max(ladder[name])) for name, m in self.elastic.items()}
        with probing(self.elastic, probes):
            found = self.forward(widths, differentiate=True)
        for site in self.sites:
            module, probe, falls = self.elastic[site.name], probes[site.name], []
            for width in ladder[site.name]:
                if width != widths[site.name]:
                    step = cost.price(site, width) - cost.price(site, widths[site.name])
                    falls.append(-_first_order(probe, make_probe(module, width, max(ladder[site.name]))) / step)
            if falls:
                found.effects[site.name] = sum(falls) / len(falls) / self.count
        return found


def _sum(features: Tensor) -> Tensor:
    """Over the images, ``[B, C]`` to ``[C]`` float64 on the CPU."""
    return features.double().sum(dim=0).cpu()


def neighbours(site: Site, width: int, cost: CostModel) -> tuple[int, int]:
    """The unit's ends one step below and above a width, at most to one unit and to the full width.

    A step is a whole number of units, whose MACs come nearest to the dearest unit of the model.
    """
    dearest = max(cost.each(other) * other.steps[1] for other in cost.sites)
    units = max(1, round(dearest / (cost.each(site) * site.steps[1])))
    index = site.steps.index(width)
    return site.steps[max(1, index - units)], site.steps[min(len(site.steps) - 1, index + units)]


@torch.no_grad()
def make_probe(module: ElasticSite, width: int, padded: int) -> Probe:
    """Weights at `width` written out at the width `padded`: zeros for the channels between; leaves for gradients."""
    in_weight, in_bias = module.in_weight(padded)
    _, _, out_weight, bias = module.weights_at(width)
    out_bias = torch.zeros_like(out_weight[:, 0]) if bias is None else bias
    by_head = out_weight.unflatten(1, (module.heads, width))
    out_weight = F.pad(by_head, (0, padded - width)).flatten(1)  # [C, H*p]
    gate = (torch.arange(padded, device=out_weight.device) < width).to(out_weight)
    leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (out_weight, out_bias, gate)]
    weights = Weights(in_weight, in_bias, leaves[0], leaves[1])
    return Probe(weights, leaves[2] if module.tied else None)


def _first_order(probe: Probe, other: Probe) -> float:
    """``<gradient at probe, other - probe>`` over out_weight, out_bias and the gate of q."""
    total = 0.0
    ours = (probe.weights.out_weight, probe.weights.out_bias, probe.gate)
    theirs = (other.weights.out_weight, other.weights.out_bias, other.gate)
    for here, there in zip(ours, theirs, strict=True):
        if here is not None and there is not None and here.grad is not None:
            total += float((here.grad.double() * (there - here).detach().double()).sum())
    return total
