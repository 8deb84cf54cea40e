"""Two ways to the one-shot dropout list: the paper's unit importance, and effects measured at cut networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from stratavit.calibration import contraction
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.method import Method
from stratavit.calibration.objectives import Objective
from stratavit.calibration.statistics import SiteStatistics, collect
from stratavit.data.pixels import Seen
from stratavit.dropout_list import sensitivity, strata
from stratavit.dropout_list.allocation import ordered_list
from stratavit.dropout_list.growth import Measure
from stratavit.dropout_list.walk import Walk, walk
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.models.cost import CostModel
from stratavit.models.final_mean import FinalMean


def make_list(
    model: nn.Module,
    sites: Sequence[Site],
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
) -> tuple[list[strata.Entry], FinalMean | None, dict[str, Any]]:
    """The one-shot dropout list, see `SuperNet.stratify`; sites that have no mean yet get theirs.

    Args:
        model: Its sites are elastic modules.
        sites: Its sites.
        cost: Of the model; importance is weighed against its `price`.
        loader: The calibration images.
        method: ``default`` (`by_effects`) or ``paper`` (`by_importance`).
        objective, measure, seed: Of the paper's method.
        plan: Of the default's.
        known: The dense model's answers, as far as they are known and still hold.
        seen: The images that the moments of folds come from.

    Returns:
        The entries, the shift of the final mean if it was measured, and facts for the provenance.

    Raises:
        StrataViTError: Bad images, labels or options.
    """
    if method == "paper":
        entries, statistics, facts = by_importance(model, sites, cost, loader, objective, measure, seed)
        _fill_means(model, statistics)
        return entries, None, facts
    if any(module.channel_mean.numel() == 0 for module in _elastic(model).values()):
        _fill_means(model, collect(model, loader, objective, "none", "means"))
    with _fully_compensated(model):
        return by_effects(model, sites, cost, loader, plan or Walk(), known, seen)


def _elastic(model: nn.Module) -> dict[str, ElasticSite]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ElasticSite)}


def _fill_means(model: nn.Module, statistics: Mapping[str, SiteStatistics]) -> None:
    for name, module in _elastic(model).items():
        if module.channel_mean.numel() == 0:
            contraction.set_mean(module, statistics[name].channel_mean)


@contextmanager
def _fully_compensated(model: nn.Module) -> Iterator[None]:
    before = [(module, module.compensation) for module in _elastic(model).values()]
    try:
        for module, _ in before:
            module.compensation = "full"
        yield
    finally:
        for module, compensation in before:
            module.compensation = compensation


def by_importance(
    model: nn.Module,
    sites: Sequence[Site],
    cost: CostModel,
    loader: Iterable[Any],
    objective: Objective,
    measure: Measure,
    seed: int = 0,
) -> tuple[list[strata.Entry], dict[str, SiteStatistics], dict[str, Any]]:
    """The paper's: sensitivity of the module times Taylor importance of the unit per MAC, tails merged (section 2).

    Returns:
        The entries, the statistics they rest on, and facts for the provenance.
    """
    statistics = collect(model, loader, objective, "none", "importance", seed=seed)
    gamma = sensitivity.bypass_sensitivity(model, sites, loader, measure)
    importance = {}
    for site in sites:
        alpha = statistics[site.name].taylor.sum(dim=0).mean(dim=0)  # [G, H, w] -> [w]
        importance[site.name] = strata.unit_importance(site, alpha.tolist(), gamma[site.name])
    facts = {
        "objective": objective,
        "measure": measure,
        "images": next(iter(statistics.values())).images,
        "sensitivity": gamma,
    }
    return strata.removal_order(sites, importance, cost.price), statistics, facts


def by_effects(
    model: nn.Module,
    sites: Sequence[Site],
    cost: CostModel,
    loader: Iterable[Any],
    plan: Walk,
    dense_outputs: DenseOutputs | None = None,
    seen: Seen | None = None,
) -> tuple[list[strata.Entry], FinalMean | None, dict[str, Any]]:
    """The default's: keep ratios that follow what one more unit brings at networks already cut (`walk`).

    Returns:
        The entries, the shift of the final mean if it was measured, and facts for the provenance.

    Raises:
        StrataViTError: The model or the images give a distance that is not finite.
    """
    states, ratios, drifts = walk(model, sites, cost, loader, plan, dense_outputs, seen)
    known = {cost.macs(state.widths) / cost.macs(): drift for state, drift in zip(states, drifts, strict=False)}
    known = {share: drift for share, drift in known.items() if share < 1}  # shares that were got, not asked
    mean = FinalMean(tuple(known), torch.stack(list(known.values())).float()) if known else None
    if not all(torch.tensor(ratio).isfinite() for ratio in ratios.values()) or (
        mean is not None and not mean.vectors.isfinite().all()
    ):
        raise StrataViTError("stratify: a cut network answered NaN or infinity; check the images and the weights")
    walked = {**asdict(plan), "states": [list(state) for state in plan.states]}
    crossed = all(module.crossed for module in model.modules() if isinstance(module, ElasticSite))
    facts = {"cross_fitted": crossed, "walk": walked, "states": [[state.share, dict(state.widths)] for state in states]}
    return ordered_list(sites, states, ratios), mean, facts
