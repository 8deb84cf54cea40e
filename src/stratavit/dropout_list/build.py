"""Two ways to the one-shot dropout list: the paper's unit importance, and effects measured at cut networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from stratavit.calibration.contraction import Method, set_mean
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import Measure, Objective
from stratavit.calibration.site_observer import SiteStatistics
from stratavit.calibration.statistics import collect
from stratavit.data.feed import Feed
from stratavit.data.pixels import Seen
from stratavit.dropout_list.allocation import ordered_list
from stratavit.dropout_list.joint import TokenSearch, joint_list
from stratavit.dropout_list.sensitivity import measure_importance
from stratavit.dropout_list.strata import Strata, removal_order
from stratavit.dropout_list.walk import Walk, walk
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.network import sites_in
from stratavit.elastic.site import UnitSizes, units_named
from stratavit.models.cost import CostModel
from stratavit.models.final_mean import FinalMean
from stratavit.utils.model import temporarily
from stratavit.utils.progress import begin_part

# of images in `contract`, as `benchmarks/conversion_cost.py` timed it: one image in a step of the walk, and in all
# measurements at one size of the search over both axes: some dozens, of which a dozen are confirmed
_STEP, _SEARCH, _CONFIRM = 0.5, 7.0, 2.0


def list_work(
    method: Method, plan: Walk | None = None, tokens: TokenSearch | None = None, images: int = 1000
) -> tuple[float, float]:
    """What making the list takes, for an estimate in units of one calibration image in `contract`.

    Args:
        method, plan, tokens: See `make_list`.
        images: Calibration images; half of them, a fold, is the most that a measurement takes.

    Returns:
        Work of the width list, and of the list over both axes.
    """
    plan, fold = plan or Walk(), (images + 1) // 2
    width = _STEP * min(plan.images, fold) * plan.steps
    if tokens is None or method == "paper":
        return width, 0.0
    joint = _SEARCH * min(tokens.images, fold) + _CONFIRM * min(tokens.confirming, fold)
    return width, joint * len(tokens.shares)


def units_for(current: UnitSizes, name: str | None, price: str, device: torch.device) -> UnitSizes:
    """The units of a list.

    Args:
        current: As set before.
        name: ``default`` or ``gpu``; None is `current`, but ``gpu`` in place of the default units where a list weighs
            latency on a GPU.
        price: ``macs`` or ``latency``.
        device: Of the weights.

    Raises:
        StrataViTError: An unknown name.
    """
    if name is not None:
        return units_named(name)
    return "gpu" if price == "latency" and device.type == "cuda" and current == units_named("default") else current


class Lists(NamedTuple):
    """What `make_list` makes."""

    widths: Strata
    joint: Strata | None  # over both axes
    final_mean: FinalMean | None  # its shift, if it was measured
    facts: dict[str, Any]  # for the provenance


def make_list(
    model: nn.Module,
    cost: CostModel,
    loader: Iterable[Any],
    method: Method,
    *,
    objective: Objective = "auto",
    measure: Measure = "auto",
    plan: Walk | None = None,
    seed: int = 0,
    known: DenseOutputs | None = None,
    seen: Seen | None = None,
    tokens: TokenSearch | None = None,
) -> Lists:
    """The one-shot dropout list, see `SuperNet.stratify`; sites that have no mean yet get theirs.

    Args:
        model: Its sites are elastic modules.
        cost: Its sites, with their floors, are cut; importance is weighed against its `price`.
        loader: The calibration images.
        method: ``default``: keep ratios that follow what one more unit brings at networks already cut (`walk`).
            ``paper``: importance of units per MAC, tails merged (section 2).
        objective, measure, seed: Of the paper's method.
        plan: Of the default's.
        known: The dense model's outputs, as far as they are known and still hold.
        seen: The images that the moments of folds come from.
        tokens: Make the list over both axes, too; of the default's.

    Returns:
        The lists and what was measured on the way.

    Raises:
        StrataViTError: Bad images, labels or options.
    """
    elastic, sites = sites_in(model), cost.sites
    if method == "paper":
        begin_part()
        importance, statistics, gamma = measure_importance(model, sites, loader, objective, measure, seed)
        _fill_means(elastic, statistics)
        images = next(iter(statistics.values())).images
        facts: dict[str, Any] = {"objective": objective, "measure": measure, "images": images, "sensitivity": gamma}
        return Lists(Strata(sites, removal_order(sites, importance, cost.price)), None, None, facts)
    if any(module.channel_mean.numel() == 0 for module in elastic.values()):
        _fill_means(elastic, collect(model, loader, objective, "none", "means"))
    feed = Feed(loader, model)
    plan = Walk() if plan is None else plan
    begin_part(*list_work(method, plan, tokens, feed.count(plan.images)))
    with temporarily("compensation", dict.fromkeys(elastic.values(), "full")):
        measured = replace(cost, sites=tuple(site.with_whole_scores() for site in sites))
        states, ratios, mean = walk(model, measured.sites, measured, feed, plan, known, seen)
        del feed  # and the images that it holds
        widths, both = Strata(sites, ordered_list(sites, states, ratios)), None
        if tokens is not None:
            begin_part()
            both = joint_list(model, sites, measured, loader, widths.entries, tokens, known)
    facts = {
        "cross_fitted": all(module.crossed for module in elastic.values()),
        "walk": asdict(plan) | {"states": [list(state) for state in plan.states]},
        "states": [[state.share, dict(state.widths)] for state in states],
    }
    if both is None:
        return Lists(widths, None, mean, facts)
    facts["both_axes"] = both[1]
    return Lists(widths, Strata((*sites, *cost.places), both[0]), mean, facts)


def _fill_means(elastic: Mapping[str, ElasticSite], statistics: Mapping[str, SiteStatistics]) -> None:
    for name, module in elastic.items():
        if module.channel_mean.numel() == 0:
            set_mean(module, statistics[name].channel_mean)
