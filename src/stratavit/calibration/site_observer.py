"""What each site adds up while the calibration images run: features, gradients, and what follows from both.

Shape legend: B images, N tokens, H heads, w head_dim (at the width in use), m MLP hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stratavit.calibration.accumulators import RunningCovariance, RunningScatter, Sums, wide
from stratavit.elastic.base import ElasticSite

Scatter = Literal["weighted", "plain", "none"]


@dataclass
class SiteStatistics:
    """What a calibration pass finds out about one site, means over all tokens of all images.

    Covariances are as precise as the tokens, everything else is in float64.

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
    return 1 - share + share * torch.where(mean == 0, 1.0, norms / mean)  # NaN stays NaN, and is noticed


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
