"""What one more unit brings to a network that is already cut, for all modules from one backward pass.

At a cut network the gradient of the distance to the dense model gives the first-order effect of every small change of
width at once: ``<d distance / d W, W(w + step) - W(w)>``, with W(w) the compensated weights at a width, padded with
zeros.

Shape legend: B images, C token width, H heads, p width of a probe, w kept width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.calibration.accumulators import wide
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import distance
from stratavit.data.pixels import Keyed
from stratavit.elastic.base import ElasticSite, Solved
from stratavit.elastic.delta import Weights
from stratavit.elastic.exchanged import Probe
from stratavit.elastic.network import run_at, site_of, sites_in
from stratavit.elastic.site import Site
from stratavit.elastic.solving import solved_alike
from stratavit.models.cost import CostModel
from stratavit.models.families import stages
from stratavit.utils.devices import to_device
from stratavit.utils.model import classes_of, model_device, model_dtype, temporarily


@contextmanager
def crossed(model: nn.Module, fold: int) -> Iterator[None]:
    """The sites are compensated without the images of a fold, inside."""
    sites = [site for site in sites_in(model).values() if site.crossed]
    means = {site: site.crossed[fold][0].to(site.out.weight) for site in sites}  # the model may have been moved since
    moments = {site: site.crossed[fold][1].to(site.out.weight.device) for site in sites}
    with temporarily("channel_mean", means), temporarily("moments", moments):
        yield


class Measured(NamedTuple):
    """A cut network next to the dense model, over the images of a `Reference`.

    Attributes:
        distance: Mean distance of its outputs to the dense model's.
        drift: Mean of what the dense model's head reads minus that of its own, ``[C]`` float64.
    """

    distance: float
    drift: Tensor


class Reference:
    """Images with the dense model's outputs for them; cut networks are measured against these.

    Args:
        model, sites: In eval mode, its weights frozen.
        batches: Images ``[3, H, W]``.
        dense_outputs: What is known of the dense model's outputs; new ones are added.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Keyed], dense_outputs: DenseOutputs
    ) -> None:
        self.sites, self.classes, self._stages = sites, classes_of(model), stages(model)
        self.elastic = {site.name: site_of(model, site.name) for site in sites}
        self._batches = [to_device(one.batch(), model_device(model), model_dtype(model)) for one in batches]
        self.count = sum(len(batch) for batch in self._batches)
        with torch.no_grad(), run_at(self.elastic, None):
            dense = [
                dense_outputs.of(batch.keys, images, self._outputs)
                for batch, images in zip(batches, self._batches, strict=True)
            ]
        self._logits = [logits for logits, _ in dense]
        self._pooled = _total(features for _, features in dense)

    def _tokens(self, batch: Tensor) -> Tensor:
        return self._stages.through(self._stages.stem(batch))

    def _outputs(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and what the head reads, ``[B, C]``."""
        tokens = self._tokens(batch)
        return self._stages.tail(tokens), self._stages.pool(tokens)

    def _compared(self, batch: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the distances of a batch of the network as it runs, and what its head reads ``[B, C]``, detached."""
        tokens = self._tokens(batch)
        with torch.no_grad():
            pooled = self._stages.pool(tokens)
        return distance(self._stages.tail(tokens), dense, self.classes), pooled

    def _drift(self, pooled: Iterable[Tensor]) -> Tensor:
        return (self._pooled - _total(pooled)) / self.count

    @torch.no_grad()
    def measure(self, widths: Mapping[str, int]) -> Measured:
        """The network at `widths`."""
        with run_at(self.elastic, widths, fixed=True):
            found, pooled = zip(*map(self._compared, self._batches, self._logits), strict=True)
        return Measured(float(wide(torch.stack(found)).sum()) / self.count, self._drift(pooled))

    @torch.no_grad()
    def distance(self, widths: Mapping[str, int]) -> float:
        """Mean distance of the network at `widths` to the dense model; what the head reads is left out."""
        with run_at(self.elastic, widths, fixed=True):
            found = [
                distance(self._stages.tail(self._tokens(batch)), dense, self.classes)
                for batch, dense in zip(self._batches, self._logits, strict=True)
            ]
        return float(wide(torch.stack(found)).sum()) / self.count

    def effects(self, cost: CostModel, widths: Mapping[str, int]) -> tuple[dict[str, float], Measured]:
        """By how much the mean distance falls, to first order, per price of what a site is given.

        Central differences over one step up and one down; a site of a single unit, or one that must keep its full
        width, has no step and is left out.

        Args:
            cost: Its `price` counts.
            widths: Every width a unit's end above 0.

        Returns:
            Site name -> effect; and the network at `widths`, which the pass runs anyway.
        """
        ladder = {site.name: neighbours(site, widths[site.name], cost) for site in self.sites}
        solved = solved_alike({module: [widths[name]] for name, module in self.elastic.items()})
        probes = {
            name: make_probes(module, [widths[name]], max(ladder[name]), solved.pop(module, None))[0]
            for name, module in self.elastic.items()
        }
        totals, pooled = list[Tensor](), list[Tensor]()  # of batches
        in_place = temporarily("probe", {module: probes[name] for name, module in self.elastic.items()})
        with in_place, run_at(self.elastic, widths), torch.enable_grad():
            for batch, dense in zip(self._batches, self._logits, strict=True):
                total, read = self._compared(batch, dense)
                total.backward()
                totals.append(total.detach())
                pooled.append(read)
        names: list[str] = []
        falls: list[Tensor] = []  # one at each step, on the device
        others = {name: [width for width in steps if width != widths[name]] for name, steps in ladder.items()}
        solved = solved_alike({self.elastic[name]: other for name, other in others.items()})
        for site in self.sites:
            module, here, other = self.elastic[site.name], widths[site.name], others[site.name]
            made = make_probes(module, other, max(ladder[site.name]), solved.pop(module, None))
            for width, probe in zip(other, made, strict=True):
                price = cost.price(site, width) - cost.price(site, here)
                names.append(site.name)
                falls.append(-_first_order(probes[site.name], probe) / price)
        numbers = torch.stack([wide(torch.stack(totals)).sum(), *falls]).tolist()  # waits for the device, once
        found: dict[str, list[float]] = {}
        for name, fall in zip(names, numbers[1:], strict=True):
            found.setdefault(name, []).append(fall)
        effects = {name: sum(values) / len(values) / self.count for name, values in found.items()}
        return effects, Measured(numbers[0] / self.count, self._drift(pooled))


def _total(batches: Iterable[Tensor]) -> Tensor:
    """Sum over all images of ``[B, C]`` batches, ``[C]`` float64."""
    return torch.stack([wide(features).sum(dim=0) for features in batches]).sum(dim=0)


def neighbours(site: Site, width: int, cost: CostModel) -> tuple[int, int]:
    """The unit's ends one step below and above a width, at most to one unit or the floor, and to the full width.

    A step is a number of units whose MACs come nearest to those of the model's most expensive unit.
    """
    largest = max(cost.each(other) * other.steps[1] for other in cost.sites)
    units = max(1, round(largest / (cost.each(site) * site.steps[1])))
    index = site.steps.index(width)
    return max(site.last_unit, site.steps[max(1, index - units)]), site.steps[min(len(site.steps) - 1, index + units)]


@torch.no_grad()
def make_probes(
    module: ElasticSite, widths: Sequence[int], padded: int, solved: Sequence[Solved] | None = None
) -> list[Probe]:
    """Weights at widths written out at the width `padded`: zeros for the channels between; leaves for gradients.

    `solved`: see `ElasticSite.outs_at`.
    """
    probes = []
    for width, (out_weight, bias) in zip(widths, module.outs_at(widths, solved), strict=True):
        out_bias = torch.zeros_like(out_weight[:, 0]) if bias is None else bias
        by_head = out_weight.unflatten(1, (module.heads, width))
        out_weight = F.pad(by_head, (0, padded - width)).flatten(1)  # [C, H*p]
        gate = (torch.arange(padded, device=out_weight.device) < width).to(out_weight)
        leaves = [leaf.detach().clone().requires_grad_(True) for leaf in (out_weight, out_bias, gate)]
        in_weight, in_bias = module.in_weight_at(padded, like=width)
        probes.append(Probe(Weights(in_weight, in_bias, leaves[0], leaves[1]), leaves[2] if module.tied else None))
    return probes


def _first_order(probe: Probe, other: Probe) -> Tensor:
    """``<gradient at probe, other - probe>`` over out_weight, out_bias and the gate of q; a float64 on the device."""
    ours, theirs = ((p.weights.out_weight, p.weights.out_bias, p.gate) for p in (probe, other))
    total = wide(probe.weights.out_weight.new_zeros(()))
    for here, there in zip(ours, theirs, strict=True):
        if here is not None and there is not None and here.grad is not None:
            total = total + (wide(here.grad) * wide((there - here).detach())).sum()
    return total
