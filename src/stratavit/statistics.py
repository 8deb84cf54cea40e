"""The calibration pass: one forward and one backward pass that gathers what the method needs, streaming.

Shape legend: B images, N tokens, H heads, w head_dim (at the width in use), m MLP hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.batches import check_labels, unpack
from stratavit.elastic import ElasticAttention, ElasticSite
from stratavit.errors import StrataViTError
from stratavit.moments import RunningMean, RunningScatter
from stratavit.progress import track
from stratavit.structure import eval_mode, model_device, model_dtype, stages

Objective = Literal["auto", "label", "cross_entropy", "prediction"]
OBJECTIVES = ("auto", "label", "cross_entropy", "prediction")
Scatter = Literal["weighted", "plain", "none"]


@dataclass
class SiteStatistics:
    """What a calibration pass leaves of one site, float64, means over all tokens of all images.

    Attributes:
        taylor: First-order Taylor importance ``mean |g*h|``: attention ``[3, H, w]`` (q, k, v), MLP
            ``[1, 1, m]`` of the post-activation.
        hessian: Second-order term ``mean 1/2 (g*h)^2``, same shape.
        channel_mean: Mean of what `proj` / `fc2` reads, ``[H, w]`` or ``[1, m]``.
        scatter: Attention only: ``[3, H, w, w]``, scatter of q, k, v around their unweighted means,
            every token weighted by its importance (method section 1) or by 1.
        images: Number of calibration images.
    """

    taylor: Tensor
    hessian: Tensor
    channel_mean: Tensor
    scatter: Tensor | None = None
    images: int = 0


class SiteObserver:
    """Turns the features of one site, and their gradients, into running moments."""

    def __init__(self, heads: int, attention: bool, scatter: Scatter) -> None:
        self.heads, self.attention = heads, attention
        self.weighted = scatter == "weighted"
        self._scatter = RunningScatter() if attention and scatter != "none" else None
        self._taylor, self._hessian, self._mean = RunningMean(), RunningMean(), RunningMean()

    def features(self, features: Tensor) -> None:
        """qkv ``[B, N, 3, H, w]``: waits for the gradient."""
        if features.requires_grad:
            self._await_gradient(features, features.detach())

    def inputs_of_out(self, features: Tensor) -> None:
        """Head outputs ``[B, N, H*w]`` or post-activations ``[B, N, m]``."""
        x = features.detach().unflatten(-1, (self.heads, -1))  # [B, N, H, w]
        self._mean.update(x.sum(dim=(0, 1), dtype=torch.float32), x.shape[0] * x.shape[1])
        if not self.attention and features.requires_grad:
            self._await_gradient(features, features.detach()[:, :, None, None])

    def outputs(self, outputs: Tensor) -> None:
        """Not needed by the paper's method."""

    def _await_gradient(self, features: Tensor, seen_as: Tensor) -> None:
        """Calls `_backward` once the gradient of `features` is there, then lets go of them."""
        held = [seen_as]
        features.register_hook(lambda gradient: self._backward(held.pop(), gradient))

    def _backward(self, features: Tensor, gradient: Tensor) -> None:
        """`features` ``[B, N, G, H, w]`` (G = 3 for qkv, 1 for an MLP) with the gradient of the objective."""
        product = (gradient.view_as(features) * features).flatten(0, 1)  # [T, G, H, w]
        tokens = product.shape[0]
        self._hessian.update(product.square().sum(dim=0) / 2, tokens)
        importance = product.abs_()
        self._taylor.update(importance.sum(dim=0), tokens)
        if self._scatter is not None:
            x = features.flatten(0, 1).flatten(1, 2).transpose(0, 1)  # [3*H, T, w]
            weight = importance.mean(dim=-1).flatten(1).T if self.weighted else None  # [3*H, T]
            self._scatter.update(x, weight)

    def result(self) -> SiteStatistics:
        """The moments over everything seen."""
        scatter = None if self._scatter is None else self._scatter.scatter.unflatten(0, (3, self.heads))
        return SiteStatistics(self._taylor.mean, self._hessian.mean, self._mean.mean, scatter)


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective = "auto",
    scatter: Scatter = "weighted",
    description: str = "calibrate",
) -> dict[str, SiteStatistics]:
    """Runs every batch forward and backward in eval mode and gathers each elastic site's statistics.

    Only activations are differentiated, not weights, so a pass costs less than a training step. The
    widths the sites are set to are the ones that are observed; skipped modules are left out.

    Args:
        model: A model whose sites are elastic modules.
        loader: Yields images ``[B, 3, H, W]``, ``(images,)`` or ``(images, labels [B])``.
        objective: What is differentiated, summed over images: ``label`` the logit of the true class (the
            reference implementation), ``cross_entropy``, ``prediction`` the logit of the predicted
            class (no labels needed); ``auto`` is ``label`` where labels are there, else ``prediction``.
        scatter: Weighting of the q, k, v scatter; ``none`` leaves it out.
        description: Title of the progress bar.

    Returns:
        Site name -> statistics.

    Raises:
        StrataViTError: No images, labels missing or out of range, or a non-finite result.
    """
    if objective not in OBJECTIVES:
        raise StrataViTError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    sites = {name: module for name, module in model.named_modules() if isinstance(module, ElasticSite)}
    observers = {
        name: SiteObserver(site.heads, isinstance(site, ElasticAttention), scatter) for name, site in sites.items()
    }
    active = {name: observer for name, observer in observers.items() if sites[name].width and not sites[name].bypassed}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for name, observer in active.items():
            sites[name].observer = observer
        with eval_mode(model):
            images_seen = _run(model, loader, objective, description)
    finally:
        for site in sites.values():
            site.observer = None
        for parameter in trainable:
            parameter.requires_grad_(True)
    if images_seen == 0:
        raise StrataViTError("calibration: the loader gave no images; check the data folder or the loader")
    results = {name: observer.result() for name, observer in active.items()}
    for name, result in results.items():
        result.images = images_seen
        if not all(t.isfinite().all() for t in vars(result).values() if isinstance(t, Tensor)):
            raise StrataViTError(
                f"calibration: {name} produced NaN or infinite values; check the weights and the images"
            )
    return results


def _run(model: nn.Module, loader: Iterable[Any], objective: Objective, description: str) -> int:
    """Forward and backward over the loader with observers in place; returns the number of images."""
    parts = stages(model)
    device, dtype = model_device(model), model_dtype(model)
    images_seen = 0
    for batch in track(loader, description):
        images, labels = unpack(batch)
        with torch.no_grad():
            tokens = parts.stem(images.to(device, dtype))
        tokens.requires_grad_(True)
        x = tokens
        with torch.enable_grad():
            for block in parts.blocks:
                x = block(x)
            value = objective_value(parts.tail(x), None if labels is None else labels.to(device), objective)
            torch.autograd.grad(value, tokens)
        images_seen += len(images)
    return images_seen


def objective_value(logits: Tensor, labels: Tensor | None, objective: Objective) -> Tensor:
    """The scalar that is differentiated: summed over the batch's logits ``[B, classes]``.

    Raises:
        StrataViTError: The objective needs labels and there are none, or they are out of range.
    """
    logits = logits.float()
    if objective == "auto":
        objective = "prediction" if labels is None else "label"
    if objective == "prediction":
        return logits.amax(dim=-1).sum()
    if labels is None:
        raise StrataViTError(f"objective {objective!r} needs labels, but the loader gives none; use 'prediction'")
    check_labels(labels, logits.shape[-1])
    if objective == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="sum")
    return logits.gather(1, labels[:, None]).sum()
