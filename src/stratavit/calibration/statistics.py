"""The calibration pass: one forward and one backward pass over the images, of which each site keeps running sums.

Shape legend: B images, N tokens, H heads, w head_dim (at the width in use), m MLP hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratavit.calibration.accumulators import RunningCovariance, RunningScatter, Sums
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import OBJECTIVES, CalibrationObjective, Objective
from stratavit.data.batches import batches_of
from stratavit.data.pixels import folds_of, keys_of
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.network import sites_in
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
from stratavit.utils.model import (
    classes_of,
    eval_mode,
    frozen,
    model_device,
    model_dtype,
    takes_gradients,
    temporarily,
)
from stratavit.utils.progress import track

Scatter = Literal["weighted", "plain", "none"]


@dataclass
class SiteStatistics:
    """What a calibration pass finds out about one site, float64, means over all tokens of all images.

    Attributes:
        taylor: First-order Taylor importance ``mean |g*h|``: attention ``[3, H, w]`` of q, k, v (``[1, H, w]`` of v,
            where q and k stay uncut), MLP ``[1, 1, m]`` of the post-activation. Empty where there is a covariance.
        hessian: Second-order term ``mean 1/2 (g*h)^2``, same shape.
        channel_mean: Mean of what `proj` / `fc2` reads, ``[H, w]`` or ``[1, m]``, tokens weighted as in `covariance`.
        scatter: Of q, k, v, ``[3, H, w, w]``, around their unweighted means, every token weighted by its importance
            (method section 1) or by 1. Of q and k, ``[2, H, w, w]``, where there is a covariance; of v,
            ``[1, H, w, w]``, where q and k stay uncut; None for an MLP.
        covariance: Of what `proj` / `fc2` reads, heads jointly and head after head, ``[H*w, H*w]`` or ``[m, m]``.
        crossed: `channel_mean` and `covariance` without the images of fold 0, and without those of fold 1.
        images: Number of calibration images.
    """

    taylor: Tensor
    hessian: Tensor
    channel_mean: Tensor
    scatter: Tensor | None = None
    covariance: Tensor | None = None
    crossed: tuple[tuple[Tensor, Tensor], ...] = ()
    images: int = 0


class SiteObserver:
    """Adds up the features of one site, and their gradients.

    Args:
        site: The module.
        scatter: Weighting of the q, k, v scatter.
        token_weight: Gather covariances, this share of every token's weight in proportion to the gradient norm at the
            module's output; None: gather Taylor terms instead.

    Attributes:
        folds: Of the images of the batch that runs, ``[B]``; windows of an image lie one after the other.
    """

    def __init__(self, site: ElasticSite, scatter: Scatter, token_weight: float | None = None) -> None:
        self.heads, self.attention = site.heads, site.attention
        self.weighted, self.folds = scatter == "weighted", torch.zeros(1, dtype=torch.long)
        turned = site.tied or (site.attention and token_weight is None)  # v turns by its covariance where there is one
        self._scatter = RunningScatter() if turned and scatter != "none" else None
        self._covariance = None if token_weight is None else RunningCovariance(token_weight)
        self._taylor, self._mean = Sums(), Sums()
        self._held: list[Tensor] = []

    def features(self, features: Tensor) -> None:
        """qkv ``[B, N, 3, H, w]``, or v alone: waits for the gradient."""
        if self._covariance is None:
            self._await_gradient(features, self._taylor_terms)
        elif self._scatter is not None:
            self._await_gradient(features, self._scatter_of_qk)

    def inputs_of_out(self, features: Tensor) -> None:
        """Head outputs ``[B, N, H*w]`` or post-activations ``[B, N, m]``."""
        x = features.detach()
        if self._covariance is not None:
            self._held = [x]
            return
        sums = x.unflatten(-1, (self.heads, -1)).sum(dim=(0, 1), dtype=torch.float32)  # [H, w]
        self._mean.add(x.shape[0] * x.shape[1], sums)
        if not self.attention:
            self._await_gradient(features, lambda x, g: self._taylor_terms(x[:, :, None, None], g[:, :, None, None]))

    def outputs(self, outputs: Tensor) -> None:
        """What the module adds, ``[B, N, C]``: the norm of its gradient weighs the token."""
        if self._covariance is not None:
            x, folds = self._held.pop(), self.folds
            x = x.reshape(len(folds), -1, x.shape[-1])  # [B, N, H*w], the tokens of all windows of an image
            outputs.register_hook(lambda gradient: self._covariance_of(x, gradient, folds.to(x.device)))

    def _await_gradient(self, features: Tensor, then: Callable[[Tensor, Tensor], None]) -> None:
        """Calls `then` with features and gradient once that is there, and lets go of them."""
        if features.requires_grad:
            held = [features.detach()]
            features.register_hook(lambda gradient: then(held.pop(), gradient))

    def _taylor_terms(self, features: Tensor, gradient: Tensor) -> None:
        """`features` ``[B, N, G, H, w]`` (G = 3 for qkv, 1 for an MLP) with the gradient of the objective."""
        product = (gradient * features).flatten(0, 1)  # [T, G, H, w]
        hessian = product.square().sum(dim=0) / 2
        importance = product.abs_()
        self._taylor.add(len(product), importance.sum(dim=0), hessian)
        if self._scatter is not None:
            self._scatter_of(features, importance)

    def _scatter_of_qk(self, features: Tensor, gradient: Tensor) -> None:
        features, gradient = features[:, :, :2], gradient[:, :, :2]
        self._scatter_of(features, (gradient * features).abs_().flatten(0, 1))

    def _scatter_of(self, features: Tensor, importance: Tensor) -> None:
        """`features` ``[B, N, G, H, w]``, `importance` ``[T, G, H, w]``."""
        assert self._scatter is not None
        x = features.flatten(0, 1).flatten(1, 2).transpose(0, 1)  # [G*H, T, w]
        weight = importance.mean(dim=-1).flatten(1).T if self.weighted else None  # [G*H, T]
        self._scatter.update(x, weight)

    def _covariance_of(self, x: Tensor, gradient: Tensor, folds: Tensor) -> None:
        """`x` ``[B, N, H*w]``, `gradient` ``[B, N, C]`` of images in `folds` ``[B]``."""
        assert self._covariance is not None
        weight = gradient.norm(dim=-1).reshape(len(x), -1)  # [B, N]
        for fold in (0, 1):
            chosen = folds == fold
            if chosen.any():
                self._covariance.update(x[chosen].flatten(0, 1), weight[chosen].flatten(), fold)

    def result(self) -> SiteStatistics:
        """The moments over everything seen."""
        scatter = None if self._scatter is None else self._scatter.scatter.unflatten(0, (-1, self.heads))
        if self._covariance is None:
            (taylor, hessian), (mean,) = self._taylor.means, self._mean.means
            return SiteStatistics(taylor, hessian, mean, scatter)
        (mean, covariance), *crossed = (
            (mean.unflatten(0, (self.heads, -1)), covariance)
            for mean, covariance in map(self._covariance.result, ((0, 1), (1,), (0,)))
        )
        empty = mean.new_empty(0)
        return SiteStatistics(empty, empty, mean, scatter, covariance, tuple(crossed))


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
    if objective not in OBJECTIVES:
        raise StrataViTError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if not takes_gradients(model):
        raise StrataViTError("calibration needs gradients: make the network and call it outside torch.inference_mode()")
    headless = not classes_of(model)
    if headless and objective not in ("auto", "feature"):
        raise StrataViTError(f"objective {objective!r} needs a head, but the model has none; use 'feature' or 'auto'")
    score = CalibrationObjective("feature" if headless else objective, token_weight is not None, seed, headless)
    sites = {name: site for name, site in sites_in(model).items() if site.width and not site.bypassed}
    observers = {name: SiteObserver(site, scatter, token_weight) for name, site in sites.items()}
    watching = temporarily("observer", {site: observers[name] for name, site in sites.items()})
    with watching, eval_mode(model), frozen(model):
        images_seen = _run(model, track(loader, description), score, observers.values(), dense_outputs)
    if images_seen == 0:
        raise StrataViTError("calibration: the loader gave no images; check the data folder or the loader")
    results = {}
    for name in sites:
        results[name] = found = observers.pop(name).result()  # popped, so that no site's sums outlive its result
        found.images = images_seen
        if not all(t.isfinite().all() for t in vars(found).values() if isinstance(t, Tensor)):
            raise StrataViTError(f"calibration: {name} produced NaN or infinite values; check weights and images")
    return results


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
        folds = folds_of(keys)
        for observer in observers:
            observer.folds = folds
        with torch.no_grad():
            tokens = parts.stem(images.to(device, dtype))
        tokens.requires_grad_(True)
        with torch.enable_grad():
            left = parts.through(tokens)
            torch.autograd.grad(score(parts, left, labels, keys), tokens)
        if dense_outputs is not None:
            with torch.no_grad():
                dense_outputs.add(keys, parts.tail(left), parts.pool(left))
        images_seen += len(images)
    return images_seen
