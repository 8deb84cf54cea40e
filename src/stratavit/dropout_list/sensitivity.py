"""The paper's importance: what is lost when a module is bypassed, shared out among its units.

Source: method section 2 (arXiv 2511.11683, module sensitivity). A bypassed module adds nothing to the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.calibration.objectives import Measure, Objective, distance
from stratavit.calibration.site_observer import SiteStatistics
from stratavit.calibration.statistics import collect
from stratavit.data.batches import batches_of, check_labels
from stratavit.elastic.network import site_of
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
from stratavit.utils.model import classes_of, eval_mode, model_device, model_dtype, temporarily
from stratavit.utils.progress import track

COST_FLOOR = 1e-4  # a module whose bypass does not raise the cost still gets this relative rise
FULL = ""  # stands for the model without a bypass among names of sites


@torch.no_grad()
def bypass_sensitivity(
    model: nn.Module, sites: Sequence[Site], loader: Iterable[Any], measure: Measure = "auto"
) -> dict[str, float]:
    """Sensitivity gamma of every module, each bypassed in turn.

    Work before the bypassed block is shared, so that this costs about half a forward pass per site. Without labels the
    full model's predictions take their place.

    Args:
        model, sites: The sites are elastic modules; the model runs in eval mode at the widths that are set.
        loader: See `statistics.collect`.
        measure: ``top1``, the relative loss of top-1 (paper), floored at half an image; ``cost``, the relative rise of
            the cross-entropy; ``auto``, top-1 unless the model is within three standard errors of chance. A model
            whose output is a feature is measured by how far that moves: the mean relative squared distance.

    Returns:
        Site name -> sensitivity > 0.

    Raises:
        StrataViTError: Unknown measure, or no images; ``top1`` of a model without a head.
    """
    classes = classes_of(model)
    if measure not in ("auto", "top1", "cost"):
        raise StrataViTError(f"measure: expected 'auto', 'top1' or 'cost', got {measure!r}")
    if measure == "top1" and not classes:
        raise StrataViTError("measure 'top1' needs a head, but the model has none; use 'auto'")
    images_seen, correct, cost = 0, defaultdict[str, int](int), defaultdict[str, float](float)
    with eval_mode(model):
        for images, labels in batches_of(track(loader, "sensitivity"), model):
            images_seen += len(images)
            outputs = _bypass_each(model, sites, images)
            full = next(outputs)[1]
            if not classes:
                for name, output in outputs:
                    cost[name] += float(distance(output, full, 0))
                continue
            target = full.argmax(dim=-1) if labels is None else labels.to(full.device)
            check_labels(target, full.shape[-1])
            for name, output in ((FULL, full), *outputs):
                correct[name] += int((output.argmax(dim=-1) == target).sum())
                cost[name] += float(F.cross_entropy(output, target, reduction="sum"))
    if not images_seen:
        raise StrataViTError(
            "sensitivity: the loader gave no images; a generator is used up after one pass, give a list or a DataLoader"
        )
    names = [site.name for site in sites]
    if not classes:
        return {name: max(cost[name] / images_seen, COST_FLOOR) for name in names}
    chance = images_seen / classes
    if measure == "top1" or (measure == "auto" and correct[FULL] > chance + 3 * chance**0.5):
        base = max(correct[FULL], 1)
        return {name: max(base - correct[name], 0.5) / base for name in names}
    return {name: max(cost[name] / max(cost[FULL], 1e-12) - 1, COST_FLOOR) for name in names}


def _bypass_each(model: nn.Module, sites: Sequence[Site], images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Outputs in float32: of the model without a bypass, then of every bypass, run from its own block on."""
    parts = stages(model)
    tokens = [parts.stem(images.to(model_device(model), model_dtype(model)))]  # tokens[i] enters block i
    for _, block in parts.blocks:
        tokens.append(block(tokens[-1]))
    yield FULL, parts.tail(tokens.pop()).float()
    for site in sites:
        index = parts.block_of(site.name)
        with temporarily("bypassed", {site_of(model, site.name): True}):
            output = parts.tail(parts.through(tokens[index], index)).float()
        yield site.name, output


def unit_importance(site: Site, alpha: Sequence[float], gamma: float) -> list[float]:
    """Importance of each unit (paper, I_u): `gamma`, the module's sensitivity, times the unit's share of `alpha`.

    `alpha` is the importance of each coordinate, ``[w]``, w a unit's end. The division by MACs happens in
    `strata.tail_candidates`.
    """
    total = sum(alpha) or 1.0
    ends = [step for step in site.steps if step <= len(alpha)]
    return [gamma * sum(alpha[a:b]) / total for a, b in pairwise(ends)]


def measure_importance(
    model: nn.Module,
    sites: Sequence[Site],
    loader: Iterable[Any],
    objective: Objective,
    measure: Measure,
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, SiteStatistics], dict[str, float]]:
    """Sensitivity of the module times Taylor importance of the unit, at the widths that are set.

    Args:
        model, objective, seed: See `statistics.collect`.
        sites: Those to measure, none of width 0.
        loader: The images; run through twice.
        measure: See `bypass_sensitivity`.

    Returns:
        By name of the site: importance of each unit, the statistics that it rests on, and sensitivity.

    Raises:
        StrataViTError: Bad images, labels or options, or a non-finite result.
    """
    statistics = collect(model, loader, objective, "none", "importance", seed=seed)
    gamma = bypass_sensitivity(model, sites, loader, measure)
    alpha = {site.name: statistics[site.name].taylor.sum(dim=0).mean(dim=0) for site in sites}  # [G, H, w] -> [w]
    importance = {site.name: unit_importance(site, alpha[site.name].tolist(), gamma[site.name]) for site in sites}
    return importance, statistics, gamma
