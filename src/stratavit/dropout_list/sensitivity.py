"""How much a model needs each module: what is lost when the module is bypassed.

Source: method section 2 (module sensitivity). A bypassed module adds nothing to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.calibration.distance import distance
from stratavit.data.batches import batches_of, check_labels
from stratavit.dropout_list.growth import Measure
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
from stratavit.utils.model import classes_of, eval_mode, model_device, model_dtype
from stratavit.utils.progress import track

COST_FLOOR = 1e-4  # a module whose bypass does not raise the cost still gets this relative rise


@dataclass
class Tally:
    """Correct answers and summed cross-entropy over the calibration images; all of them, or of each bypass."""

    images: int = 0
    classes: int = 0
    correct: int = 0
    cost: float = 0.0
    bypassed_correct: dict[str, int] = field(default_factory=dict)
    bypassed_cost: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def bypass_sensitivity(
    model: nn.Module, sites: Sequence[Site], loader: Iterable[Any], measure: Measure = "auto"
) -> dict[str, float]:
    """Sensitivity gamma of every module, each bypassed in turn.

    Work before the bypassed block is shared, so that this costs about half a forward pass per site. Without labels the
    full model's predictions take their place.

    Args:
        model: A model whose sites are elastic modules; run in eval mode at the widths that are set.
        sites: Its sites.
        loader: See `statistics.collect`.
        measure: ``top1``, the relative loss of top-1 (paper), floored at half an image; ``cost``, the relative
            rise of the cross-entropy; ``auto``, top-1 unless the model is within three standard errors of chance. A
            model that answers with features is measured by how far they move: the mean relative squared distance.

    Returns:
        Site name -> sensitivity > 0.

    Raises:
        StrataViTError: Unknown measure, or no images; ``top1`` of a model without a head.
    """
    if measure not in ("auto", "top1", "cost"):
        raise StrataViTError(f"measure: expected 'auto', 'top1' or 'cost', got {measure!r}")
    if measure == "top1" and not classes_of(model):
        raise StrataViTError("measure 'top1' needs a head, but the model has none; use 'auto'")
    tally = Tally()
    with eval_mode(model):
        for images, labels in batches_of(track(loader, "sensitivity"), model):
            _bypass_each(model, sites, images, labels, tally)
    if tally.images == 0:
        raise StrataViTError(
            "sensitivity: the loader gave no images; a generator is used up after one pass, give a list or a DataLoader"
        )
    if not tally.classes:
        return {name: max(cost / tally.images, COST_FLOOR) for name, cost in tally.bypassed_cost.items()}
    if measure == "top1" or (measure == "auto" and _above_chance(tally)):
        floor, base = 0.5, max(tally.correct, 1)
        return {name: max(base - correct, floor) / base for name, correct in tally.bypassed_correct.items()}
    return {name: max(cost / max(tally.cost, 1e-12) - 1, COST_FLOOR) for name, cost in tally.bypassed_cost.items()}


def _bypass_each(model: nn.Module, sites: Sequence[Site], images: Tensor, labels: Tensor | None, tally: Tally) -> None:
    """Adds one batch: the full model, then every bypass from its own block on."""
    parts = stages(model)
    tokens = [parts.stem(images.to(model_device(model), model_dtype(model)))]  # tokens[i] enters block i
    for _, block in parts.blocks:
        tokens.append(block(tokens[-1]))
    logits = parts.tail(tokens.pop()).float()
    tally.images += len(images)
    tally.classes = classes_of(model)
    if tally.classes:
        target = logits.argmax(dim=-1) if labels is None else labels.to(logits.device)
        check_labels(target, logits.shape[-1])
        tally.correct += int((logits.argmax(dim=-1) == target).sum())
        tally.cost += float(F.cross_entropy(logits, target, reduction="sum"))
    for site in sites:
        module = model.get_submodule(site.name)
        assert isinstance(module, ElasticSite)
        index = parts.block_of(site.name)
        module.bypassed = True
        try:
            bypassed = parts.tail(parts.through(tokens[index], index)).float()
        finally:
            module.bypassed = False
        if tally.classes:
            correct = int((bypassed.argmax(dim=-1) == target).sum())
            tally.bypassed_correct[site.name] = tally.bypassed_correct.get(site.name, 0) + correct
            cost = float(F.cross_entropy(bypassed, target, reduction="sum"))
        else:
            cost = float(distance(bypassed, logits, 0))
        tally.bypassed_cost[site.name] = tally.bypassed_cost.get(site.name, 0.0) + cost


def _above_chance(tally: Tally) -> bool:
    chance = tally.images / tally.classes
    return tally.correct > chance + 3 * chance**0.5
