"""The dropout list of the default method: keep ratios that follow effects at cut networks (`marginal_effects`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.data.feed import Feed
from stratavit.data.pixels import Seen
from stratavit.dropout_list.allocation import State, allocate
from stratavit.dropout_list.marginal_effects import Reference, crossed
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.models.cost import CostModel
from stratavit.models.families import last_norm
from stratavit.models.final_mean import FinalMean
from stratavit.utils.model import eval_mode, frozen, full_products, takes_gradients
from stratavit.utils.progress import track

FAMILIAR = 0.1  # share of images below which they are not those of `contract`


@dataclass(frozen=True)
class Walk:
    """How the list is measured.

    Attributes:
        states: (share of the MACs, steps there), largest first.
        images: Of each step; all of them if there are fewer.
        rate: Largest change of the logarithm of a keep ratio in one step.
    """

    states: tuple[tuple[float, int], ...] = ((5 / 6, 3), (2 / 3, 3), (1 / 2, 4), (1 / 3, 5))
    images: int = 150
    rate: float = 0.3

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.states]
        falling = shares == sorted(set(shares), reverse=True) and all(0 < share < 1 for share in shares)
        stepping = shares and all(steps >= 1 for _, steps in self.states)
        if not (falling and stepping and self.images >= 1 and self.rate > 0):
            raise StrataViTError(
                "plan: expected states (share, steps) with falling shares between 0 and 1 and at least 1 step each, at "
                f"least 1 image and a rate above 0, got {self}"
            )

    @property
    def steps(self) -> int:
        """At all sizes together."""
        return sum(steps for _, steps in self.states)


def walk(
    model: nn.Module,
    sites: Sequence[Site],
    cost: CostModel,
    loader: Iterable[Any] | Feed,
    plan: Walk,
    dense_outputs: DenseOutputs | None = None,
    seen: Seen | None = None,
) -> tuple[list[State], dict[str, float], FinalMean | None]:
    """Measures keep ratios at one size after the other; the last step at a size is taken back if it made that worse.

    Args:
        model, sites, cost: The sites are elastic modules, calibrated.
        loader: See `statistics.collect`, or what feeds its images; labels are not used.
        plan: Sizes, steps and images.
        dense_outputs: Of the dense model, as far as they are known.
        seen: The images that the moments of the sites were computed from, if that is known.

    Returns:
        The states; the logarithm of the keep ratios at the last one; by how much the mean of what the head reads has
        moved at the states from the dense model's, dense minus small (None if no norm can take it up).

    Raises:
        StrataViTError: Bad images, inference mode, or a cut network whose output is not finite.
    """
    if not takes_gradients(model):
        raise StrataViTError("stratify needs gradients: make the network and call it outside torch.inference_mode()")
    feed, fold = loader if isinstance(loader, Feed) else Feed(loader, model), 0
    dense_outputs = DenseOutputs() if dense_outputs is None else dense_outputs
    ratios = dict.fromkeys((site.name for site in sites), 0.0)
    caps = {site.name: site.width for site in sites}
    floor = cost.macs({site.name: site.last_unit for site in sites}) / cost.macs()
    steps = [(share, left) for share, count in plan.states if share > floor for left in reversed(range(count))]
    states: list[State] = []
    distances: list[float] = []
    drifts: dict[float, Tensor] = {}  # by the share that was reached, not the one asked for
    with eval_mode(model), frozen(model), full_products():
        for share, left in track(steps, "measure the list"):
            fold = 1 - fold
            batches = feed.take(plan.images, fold)
            if seen is not None:
                _warn_of_other_images([key for batch in batches for key in batch.keys], seen)
                seen = None
            reference = Reference(model, sites, batches, dense_outputs)
            with crossed(model, fold):
                before = allocate(cost, ratios, share, caps)
                effects, here = reference.effects(cost, before)
                new = moved(ratios, effects, plan.rate)
                if left:
                    ratios = new
                    continue
                after = allocate(cost, new, share, caps)
                there = here if after == before else reference.measure(after)
                worse = not there.distance <= here.distance  # NaN, too
                ratios, caps, reached = (ratios, before, here) if worse else (new, after, there)
                states.append(State(share, caps))
                distances.append(reached.distance)
                if last_norm(model) is not None and cost.macs(caps) < cost.macs():
                    drifts[cost.macs(caps) / cost.macs()] = reached.drift.cpu()
    mean = FinalMean(tuple(drifts), torch.stack(list(drifts.values())).float()) if drifts else None
    finite = all(map(math.isfinite, (*ratios.values(), *distances)))
    if not finite or (mean is not None and not mean.vectors.isfinite().all()):
        raise StrataViTError("stratify: the output of a cut network is NaN or infinite; check the images and weights")
    return states, ratios, mean


def _warn_of_other_images(keys: Sequence[bytes], seen: Seen) -> None:
    """Warns if hardly any of the images was seen: an image's fold is found by its pixels."""
    if seen.share(keys) < FAMILIAR:
        print(
            "stratify: cross-fitting cannot work, because the loader gives other pixels than contract's did (random "
            "augmentation, or another data set); give both the same images in the evaluation transform",
            file=sys.stderr,
        )


def moved(ratios: Mapping[str, float], effects: Mapping[str, float], rate: float) -> dict[str, float]:
    """Log ratios after one step: up where the effect is above the mean, by at most `rate`; their mean stays 0.

    Sites without an effect only follow the shift of the mean.
    """
    mean = sum(effects.values()) / max(len(effects), 1)
    if mean <= 0:
        return dict(ratios)
    new = {name: ratio + rate * math.tanh(effects.get(name, mean) / mean - 1) for name, ratio in ratios.items()}
    centre = sum(new.values()) / len(new)
    return {name: ratio - centre for name, ratio in new.items()}
