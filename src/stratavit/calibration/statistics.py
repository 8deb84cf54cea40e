"""The calibration pass: one forward and one backward pass over the images, of which each site keeps running sums.

Shape legend: B images, N tokens, H heads, w head_dim (at the width in use), m MLP hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratavit.calibration.accumulators import RunningCovariance, RunningScatter, Sums, wide
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import OBJECTIVES, CalibrationObjective, Objective
from stratavit.data.batches import batches_of
from stratavit.data.pixels import folds_of, keys_of
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.network import sites_in
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
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

Scatter = Literal["weighted", "plain", "none"]
LEAST_IMAGES = 2  # that run at a time
HOST_NUMBERS, DEVICE_NUMBERS = 2**19, 2**22  # in the tokens of those that run at a time: 3 images of a ViT-B, or 27


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
        pairs: Products of what rotation pairs add to the scores, ``[P, P]``, see `rotary.pair_products`.
        images: Number of calibration images.
    """

    taylor: Tensor
    hessian: Tensor
    channel_mean: Tensor
    scatter: Tensor | None = None
    covariance: Tensor | None = None
    crossed: tuple[tuple[Tensor, Tensor], ...] = ()
    pairs: Tensor | None = None
    images: int = 0


def by_head(x: Tensor, heads: int) -> Tensor:
    """What `out` reads ``[B, ..., H*w]``, or its gradient, in the form of attention's features: ``[B, N, 1, H, w]``."""
    return x.flatten(1, -2).unflatten(-1, (1, heads, -1))


def token_weights(norms: Tensor, share: float) -> Tensor:
    """Weights of tokens ``[B, N]``, of mean 1 over every image, from gradient norms of the same shape.

    Part of a token's weight is 1, the other `share` is in proportion to how much the output reacts to the token, as
    compared with the image's others; these are all 1 where it reacts to none.
    """
    mean = norms.mean(dim=1, keepdim=True)
    return 1 - share + share * torch.where(mean > 0, norms / mean, 1.0)


class SiteObserver:
    """Adds up the features of one site, and their gradients.

    Args:
        site: The module.
        scatter: Weighting of the q, k, v scatter.
        token_weight: Gather covariances, with tokens weighted as `token_weights` says by this share of the gradient;
            None: gather Taylor terms instead.
        host: Keep the sums of covariances on the CPU.

    Attributes:
        sizes: Images of fold 0 and of fold 1 in the batch that runs, in this order; windows of an image lie one after
            the other.
        pair_sums: `SiteStatistics.pairs` so far.
    """

    def __init__(
        self, site: ElasticSite, scatter: Scatter, token_weight: float | None = None, host: bool = False
    ) -> None:
        self.heads, self.attention, self.host = site.heads, site.attention, host
        self.weighted, self.sizes, self._share = scatter == "weighted", (1, 0), token_weight
        turned = site.tied or (site.attention and token_weight is None)  # v turns by its covariance where there is one
        self._scatter = RunningScatter() if turned and scatter != "none" else None
        self._covariance = None if token_weight is None else RunningCovariance(host)
        self._taylor, self._mean = Sums(), Sums()
        self._held: list[Tensor] = []
        self.pair_sums: Tensor | None = None

    def features(self, features: Tensor) -> None:
        """qkv ``[B, N, 3, H, w]``, or v alone: waits for the gradient."""
        if self._covariance is None:
            self._await_gradient(features, self._taylor_terms)
        elif self._scatter is not None:
            self._await_gradient(features, self._scatter_of_qk)

    def pairs(self, products: Callable[[], Tensor]) -> None:
        """Products of rotation pairs, ``[P, P]``: added up."""
        found = wide(products())
        self.pair_sums = found if self.pair_sums is None else self.pair_sums + found

    def inputs_of_out(self, features: Tensor) -> None:
        """Head outputs ``[B, N, H*w]`` or post-activations ``[B, N, m]``, of maps ``[B, H, W, m]``."""
        x = features.detach()
        if self._covariance is not None:
            self._held = [x]
            return
        x = x.flatten(1, -2)
        sums = x.unflatten(-1, (self.heads, -1)).sum(dim=(0, 1), dtype=torch.float32)  # [H, w]
        self._mean.add(x.shape[0] * x.shape[1], sums)
        if not self.attention:
            self._await_gradient(features, lambda *both: self._taylor_terms(*(by_head(x, self.heads) for x in both)))

    def outputs(self, outputs: Tensor) -> None:
        """What the module adds, ``[B, N, C]``: the norm of its gradient weighs the token."""
        if self._covariance is not None:
            x, sizes = self._held.pop(), self.sizes
            x = x.reshape(sum(sizes), -1, x.shape[-1])  # [B, N, H*w], the tokens of all windows of an image
            outputs.register_hook(lambda gradient: self._covariance_of(x, gradient, sizes))

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

    def _covariance_of(self, x: Tensor, gradient: Tensor, sizes: tuple[int, int]) -> None:
        """`x` ``[B, N, H*w]``, `gradient` ``[B, N, C]``, images of fold 0 before those of fold 1."""
        assert self._covariance is not None
        assert self._share is not None
        weights = token_weights(gradient.norm(dim=-1).reshape(len(x), -1), self._share)
        for fold, (own, weight) in enumerate(zip(x.split(sizes), weights.split(sizes), strict=True)):
            if len(own):
                self._covariance.update(own.flatten(0, 1), weight.flatten() if self._share else None, fold)

    def scatter(self) -> Tensor | None:
        """`SiteStatistics.scatter`."""
        return None if self._scatter is None else self._scatter.scatter.unflatten(0, (-1, self.heads))

    @property
    def has_covariance(self) -> bool:
        """Whether covariances were asked for."""
        return self._covariance is not None

    def covariance(self) -> Tensor:
        """`SiteStatistics.covariance`, where one was asked for."""
        return self.moments((0, 1))[1]

    def result(self) -> SiteStatistics:
        """The moments over everything seen, but for those of the folds."""
        scatter = self.scatter()
        if self._covariance is None:
            (taylor, hessian), (mean,) = self._taylor.means, self._mean.means
            return SiteStatistics(taylor, hessian, mean, scatter, pairs=self.pair_sums)
        mean, covariance = self.moments((0, 1))
        empty = mean.new_empty(0)
        return SiteStatistics(empty, empty, mean, scatter, covariance, pairs=self.pair_sums)

    def crossed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`SiteStatistics.crossed`, one after the other; nothing where there are no covariances."""
        if self._covariance is not None:
            yield from map(self.moments, ((1,), (0,)))

    def moments(self, folds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and covariance over the images of folds, where they were asked for."""
        assert self._covariance is not None
        mean, covariance = self._covariance.result(folds)
        return mean.unflatten(0, (self.heads, -1)), covariance

    def is_finite(self) -> Tensor:
        """Whether all sums are, one boolean on the device."""
        sums = [self._taylor, self._mean, *(() if self._scatter is None else (self._scatter.sums,))]
        parts = [total.isfinite().all() for one in sums for total in one.totals]
        parts += [] if self._covariance is None else [self._covariance.is_finite()]
        return torch.stack([part.to(parts[0].device) for part in parts]).all()


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
        images, labels, keys, sizes = by_fold(images, labels, keys)
        with torch.no_grad():
            tokens = parts.stem(images.to(device, dtype))
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
    """Images of a batch ``[B, ...]`` that run at a time: few enough that activations do not outgrow the sums."""
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
    labels = None if labels is None else labels[order.to(labels.device)]
    return images[order.to(images.device)], labels, [keys[i] for i in order.tolist()], (len(keys) - second, second)
