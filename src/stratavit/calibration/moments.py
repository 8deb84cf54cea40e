"""Means and moments of sites in the coordinates they were sorted to, from sums of the calibration pass.

Of all sites that are sorted together, the numbers that the host needs are read from the device once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stratavit.calibration.accumulators import GramSum
from stratavit.calibration.site_observer import SiteObserver, SiteStatistics
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.compensation import Moments, PackedMoments, attempt, cholesky, factorise, rows_of
from stratavit.utils.model import full_products


@dataclass
class Draft:
    """Moments of a site whose numbers are still on the device.

    Attributes:
        mean: Of the channels, ``[H, d]`` or ``[1, m]``.
        moments: Their ridge and energy are 0 yet, and their factor is of no use where it failed.
        numbers: Ridge, energy, and whether the factor failed, ``[3]`` float64.
        covariance: Makes the covariance once more, coordinate-major, ``[d*H, d*H]``.
    """

    mean: Tensor
    moments: Moments | PackedMoments
    numbers: Tensor
    covariance: Callable[[], Tensor]

    def settled(self, ridge: float, energy: float, failed: float) -> Any:
        """The moments with their numbers, packed if they were; of a covariance regularised until it has a factor."""
        found: Any = self.moments
        if failed:
            factor, ridge = cholesky(self.covariance())
            again = Moments(rows_of(factor), ridge, energy)
            found = again.packed() if isinstance(found, PackedMoments) else again.to(found.factor.device)
        return replace(found, ridge=ridge, energy=max(energy, 0.0))  # rounding can leave a little below


def draft(module: ElasticSite, observer: SiteObserver, new: Tensor, folds: tuple[int, ...], products: GramSum) -> Draft:
    """The moments of folds of the images, without waiting for the device; packed unless they are of both folds.

    Args:
        module: Already in its new coordinates.
        observer: What was seen of it.
        new: Head turns ``[H, d, d]``, or the order ``[m]`` of channels.
        folds: 0, 1 or both.
        products: `map_products` before.
    """

    def moved(covariance: Tensor) -> Tensor:
        return by_coordinate(moved_covariance(new.to(covariance.device), covariance), module.heads)

    mean, covariance = observer.moments(folds)
    energy, mean = products.inner(covariance), moved_mean(new.to(mean.device), mean)
    covariance = moved(covariance)  # one at a time
    factor, ridge, failed = attempt(covariance)
    home = torch.device("cpu") if observer.host else module.out.weight.device
    moments = Moments(rows_of(factor), 0.0, 0.0).to(home)
    numbers = torch.stack([ridge, energy, failed.to(ridge)])
    kept = moments if len(folds) == 2 else moments.packed()
    return Draft(mean, kept, numbers, lambda: moved(observer.moments(folds)[1]))


def keep_drafts(modules: Sequence[ElasticSite], drafts: Sequence[Sequence[Draft]]) -> None:
    """Gives modules their moments: of each of all images, without fold 0, and without fold 1; or none."""
    every = [one for own in drafts for one in own]
    if not every:
        return
    numbers = torch.stack([one.numbers.to(every[0].numbers.device) for one in every]).tolist()  # waits, once for all
    known = iter(numbers)
    for module, own in zip(modules, drafts, strict=True):
        if own:
            all_images, *crossed = [one.settled(*next(known)) for one in own]
            module.moments = all_images
            means = [one.mean.to(module.out.weight) for one in own[1:]]
            module.crossed = tuple(zip(means, crossed, strict=True))


def map_products(module: ElasticSite) -> GramSum:
    """``W^T W`` of the map out of the channels, whose product with a covariance is the output's variance."""
    weight = module.whole_out().detach()
    products = GramSum(weight.shape[1], weight.new_zeros(GramSum.size(weight.shape[1])))
    with full_products():
        products.add(weight)
    return products


def moved_mean(new: Tensor, mean: Tensor) -> Tensor:
    """Mean ``[H, d]`` or ``[1, m]`` after heads were turned by `new` ``[H, d, d]``, or channels ordered by ``[m]``."""
    return mean[:, new] if new.dim() == 1 else (new.to(mean) @ mean.unsqueeze(-1)).squeeze(-1)


def moved_covariance(new: Tensor, covariance: Tensor) -> Tensor:
    """Covariance ``[H*d, H*d]`` or ``[m, m]`` after the same."""
    if new.dim() == 1:
        starts = torch.arange(0, len(covariance), len(new), device=new.device)
        order = (starts[:, None] + new).flatten()  # of every channel of a head alike, where heads are ordered
        return covariance[order[:, None], order]
    shape, turn = new.shape[:2], new.to(covariance)
    blocks = covariance.unflatten(0, shape).unflatten(2, shape)  # [H, d, H, d]
    return torch.einsum("hij,hjgk,glk->higl", turn, blocks, turn).flatten(2).flatten(0, 1)


def by_coordinate(covariance: Tensor, heads: int) -> Tensor:
    """A head-major covariance ``[H*d, H*d]``, coordinate-major."""
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).permute(1, 0, 3, 2)  # [d, H, d, H]
    return blocks.flatten(2).flatten(0, 1)


def moments_of(module: ElasticSite, found: SiteStatistics) -> tuple[Tensor, Moments]:
    """Mean ``[H, d]`` and moments of a site's channels in their coordinates, from statistics with a covariance."""
    assert found.covariance is not None
    energy = float(map_products(module).inner(found.covariance))
    moments = factorise(by_coordinate(found.covariance, module.heads), energy)
    return found.channel_mean, moments.to(module.out.weight.device)
