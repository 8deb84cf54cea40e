"""The calibration pass: one forward and one backward pass over the images, of which each site keeps running sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import OBJECTIVES, CalibrationObjective, Objective
from stratavit.calibration.site_observer import Scatter, SiteObserver, SiteStatistics
from stratavit.data.batches import batches_of
from stratavit.data.pixels import folds_of, keys_of
from stratavit.elastic.network import sites_in
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
from stratavit.utils.devices import to_device
from stratavit.utils.freed_memory import give_back
from stratavit.utils.model import (
    classes_of,
    eval_mode,
    frozen,
    full_products,
    model_device,
    model_dtype,
    takes_gradients,
    temporarily,
)
from stratavit.utils.progress import track

LEAST_IMAGES = 2  # that run at a time
HOST_NUMBERS, DEVICE_NUMBERS = 2**19, 2**22  # in the tokens of those that run at a time: 3 images of a ViT-B, or 27


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective = "auto",
    scatter: Scatter = "weighted",
    description: str = "calibrate",
    token_weight: float | None = None,
    seed: int = 0,
    dense_outputs: DenseOutputs | None = None,
) -> dict[str, SiteStatistics]:
    """Runs every batch forward and backward in eval mode and gathers each elastic site's statistics.

    Only activations are differentiated, not weights, so a pass costs less than a training step. Sites are observed at
    the widths they are set to; skipped modules are left out.

    Args:
        model: Its sites are elastic modules.
        loader: Yields what `batches.unpack` reads: images ``[B, 3, H, W]``, with or without labels, in any order.
        objective: What is differentiated, summed over images: ``label`` the logit of the true class (the
            reference implementation), ``cross_entropy``, and without labels: ``prediction`` the logit of the
            predicted class, ``sampled`` the cross-entropy of a class drawn from the prediction, ``feature`` half
            the squared norm of the pooled features. ``auto`` is ``label``, or ``prediction`` without labels; with
            `token_weight` ``cross_entropy``, or ``sampled`` without; for a model without a head ``feature``.
        scatter: Weighting of the q, k, v scatter; ``none`` leaves it out.
        description: Title of the progress bar.
        token_weight: Gather covariances in place of Taylor terms, see `SiteObserver`.
        seed: For ``sampled``.
        dense_outputs: Remembers the model's outputs, which the pass computes anyway.

    Returns:
        Site name -> statistics.

    Raises:
        StrataViTError: No images, labels missing or out of range, or a non-finite result.
    """
    observers, images = observe(model, loader, objective, scatter, description, token_weight, seed, dense_outputs)
    results = {}
    for name in list(observers):
        observer = observers.pop(name)  # so that no site's sums outlive its result
        results[name] = replace(observer.result(), crossed=tuple(observer.crossed()), images=images)
    return results


def observe(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    scatter: Scatter,
    description: str,
    token_weight: float | None,
    seed: int = 0,
    dense_outputs: DenseOutputs | None = None,
    host: bool = False,
) -> tuple[dict[str, SiteObserver], int]:
    """The pass of `collect`: site name -> what its observer has added up, and the number of images.

    With `host` the sums of covariances are on the CPU. Results need several times the memory of the sums: whoever can
    uses up one site after the other.
    """
    if objective not in OBJECTIVES:
        raise StrataViTError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if not takes_gradients(model):
        raise StrataViTError("calibration needs gradients: make the network and call it outside torch.inference_mode()")
    headless = not classes_of(model)
    if headless and objective not in ("auto", "feature"):
        raise StrataViTError(f"objective {objective!r} needs a head, but the model has none; use 'feature' or 'auto'")
    score = CalibrationObjective("feature" if headless else objective, token_weight is not None, seed, headless)
    sites = {name: site for name, site in sites_in(model).items() if site.width and not site.bypassed}
    observers = {name: SiteObserver(site, scatter, token_weight, host) for name, site in sites.items()}
    watching = temporarily("observer", {site: observers[name] for name, site in sites.items()})
    with watching, eval_mode(model), frozen(model), full_products():
        images_seen = _run(model, track(loader, description), score, observers.values(), dense_outputs)
    if images_seen == 0:
        raise StrataViTError("calibration: the loader gave no images; check the data folder or the loader")
    finite = [observer.is_finite() for observer in observers.values()]
    together = torch.stack([one.to(finite[0].device) for one in finite]).tolist() if finite else []
    for name, is_finite in zip(observers, together, strict=True):
        if not is_finite:
            raise StrataViTError(f"calibration: {name} produced NaN or infinite values; check weights and images")
    return observers, images_seen


def _run(
    model: nn.Module,
    loader: Iterable[Any],
    score: CalibrationObjective,
    observers: Iterable[SiteObserver],
    dense_outputs: DenseOutputs | None,
) -> int:
    """Forward and backward over the loader with observers in place; returns the number of images."""
    parts = stages(model)
    device, dtype = model_device(model), model_dtype(model)
    images_seen = 0
    for images, labels in batches_of(loader, model):
        keys = keys_of(images)
        images, labels, keys, sizes = by_fold(to_device(images, device, dtype), labels, keys)
        with torch.no_grad():
            tokens = parts.stem(images)
        for some in _runs(tokens):
            first = min(max(sizes[0] - some.start, 0), some.stop - some.start)  # of fold 0
            for observer in observers:
                observer.sizes = first, some.stop - some.start - first
            into = tokens[some].requires_grad_(True)
            with torch.enable_grad():
                left = parts.through(into)
                own = None if labels is None else labels[some]
                torch.autograd.grad(score(parts, left, own, keys[some]), into)
            if dense_outputs is not None:
                with torch.no_grad():
                    dense_outputs.add(keys[some], parts.tail(left), parts.pool(left))
            del into, left
        give_back()
        images_seen += len(images)
    return images_seen


def _runs(tokens: Tensor) -> list[slice]:
    """Images of a batch ``[B, ...]`` that run at a time: so few that activations do not grow with the batch."""
    numbers = HOST_NUMBERS if tokens.device.type == "cpu" else DEVICE_NUMBERS
    most = max(LEAST_IMAGES, numbers * len(tokens) // tokens.numel())
    size = -(-len(tokens) // -(-len(tokens) // most))  # about the same for all
    return [slice(start, min(start + size, len(tokens))) for start in range(0, len(tokens), size)]


def by_fold(
    images: Tensor, labels: Tensor | None, keys: list[bytes]
) -> tuple[Tensor, Tensor | None, list[bytes], tuple[int, int]]:
    """A batch with its images of fold 0 first, and how many there are of either: each fold is then a view."""
    folds = folds_of(keys)
    order = folds.argsort(stable=True)
    second = int(folds.sum())
    labels = None if labels is None else labels[to_device(order, labels.device)]
    images = images[to_device(order, images.device)]
    return images, labels, [keys[i] for i in order.tolist()], (len(keys) - second, second)
