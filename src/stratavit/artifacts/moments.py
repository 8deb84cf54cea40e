"""What a super-network knows about its channels, as tensors for a file, and back. No code is read or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.compensation import Moments
from stratavit.elastic.site import Site
from stratavit.errors import ArtifactError
from stratavit.files.state_dicts import FLOATS
from stratavit.models.final_mean import FinalMean

FACTOR = ".factor"
SHARES, VECTORS = "final_mean.shares", "final_mean.vectors"


def to_tensors(
    elastic: Mapping[str, ElasticSite], final_mean: FinalMean | None, second: bool = True
) -> dict[str, Tensor]:
    """``SITE.mean``; ``SITE.factor`` (lower triangle, row by row) and ``SITE.scalars`` (ridge, energy); the final mean.

    Args:
        elastic: Site name -> module.
        final_mean: Of the super-network, if any.
        second: Include second moments (the factors), which are most of the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in elastic.items():
        if module.channel_mean.numel():
            tensors[f"{name}.mean"] = module.channel_mean
        if second and module.moments is not None:
            tensors[f"{name}{FACTOR}"] = packed(module.moments.factor)
            tensors[f"{name}.scalars"] = torch.tensor(
                [module.moments.ridge, module.moments.energy], dtype=torch.float64
            )
    if second and final_mean is not None:
        tensors[SHARES] = torch.tensor(final_mean.shares, dtype=torch.float64)
        tensors[VECTORS] = final_mean.vectors
    return tensors


def from_tensors(
    elastic: Mapping[str, ElasticSite], sites: Sequence[Site], width: int, tensors: Mapping[str, Tensor], source: str
) -> FinalMean | None:
    """Gives the sites of a super-network what `to_tensors` wrote.

    Args:
        elastic: Site name -> module.
        sites: The same sites.
        width: Of what the head reads.
        tensors: From the file.
        source: Its name, for the message.

    Returns:
        The final mean, if the file has one.

    Raises:
        ArtifactError: A tensor does not fit the model or is not finite; it is named.
    """
    parts = (".mean", FACTOR, ".scalars")
    known = {SHARES, VECTORS, *(f"{site.name}{part}" for site in sites for part in parts)}
    for name, tensor in sorted(tensors.items()):
        if name not in known or tensor.dtype not in FLOATS:
            raise ArtifactError(
                f"{source}: {ascii(name)[1:-1][:200]} ({str(tensor.dtype).removeprefix('torch.')}) is nothing that is "
                "known of this model's channels; copy the file or save the model again"
            )
    factors = [f"{site.name}{FACTOR}" in tensors for site in sites]
    if any(factors) and not all(factors):
        name = sites[factors.index(False)].name
        raise ArtifactError(f"{source}: the factor of {name} is missing, others are there; save the model again")
    for site in sites:
        module = elastic[site.name]
        mean = tensors.get(f"{site.name}.mean")
        if mean is not None:
            mean = mean.to(module.out.weight)  # what is finite in a wider type may not be in this one
            if mean.shape != (site.heads, site.width) or not mean.isfinite().all():
                raise ArtifactError(
                    f"{source}: the mean of {site.name} should be {site.heads} x {site.width} finite numbers"
                )
            module.channel_mean = mean
        if f"{site.name}{FACTOR}" in tensors:
            module.moments = _moments(site, tensors, source).to(module.out.weight.device)
    return _final_mean(width, tensors, source) if VECTORS in tensors else None


def packed(factor: Tensor) -> Tensor:
    """The lower triangle of ``[n, n]``, row by row, ``[n (n+1) / 2]``."""
    rows, columns = torch.tril_indices(*factor.shape, device=factor.device)
    return factor[rows, columns]


def unpacked(triangle: Tensor, n: int) -> Tensor:
    """``[n, n]`` from its lower triangle."""
    factor = triangle.new_zeros(n, n)
    rows, columns = torch.tril_indices(n, n)
    factor[rows, columns] = triangle
    return factor


def _moments(site: Site, tensors: Mapping[str, Tensor], source: str) -> Moments:
    triangle, scalars = tensors[f"{site.name}{FACTOR}"], tensors.get(f"{site.name}.scalars")
    n = site.heads * site.width
    fits = triangle.shape == (n * (n + 1) // 2,) and triangle.dtype == torch.float32 and triangle.isfinite().all()
    factor = unpacked(triangle, n) if fits else None
    if factor is None or not (factor.diagonal() > 0).all():
        raise ArtifactError(
            f"{source}: the factor of {site.name} should be the triangle of a {n} x {n} Cholesky factor, float32"
        )
    if scalars is None or scalars.shape != (2,) or not scalars.isfinite().all() or float(scalars.min()) < 0:
        raise ArtifactError(f"{source}: the scalars of {site.name} should be two finite numbers of at least 0")
    if f"{site.name}.mean" not in tensors:
        raise ArtifactError(f"{source}: the mean of {site.name} is missing, its factor is there")
    ridge, energy = scalars.tolist()
    return Moments(factor, ridge, energy)


def _final_mean(width: int, tensors: Mapping[str, Tensor], source: str) -> FinalMean:
    vectors, shares = tensors[VECTORS].float(), tensors.get(SHARES, torch.zeros(0)).flatten().tolist()
    falling = shares == sorted(set(shares), reverse=True) and all(0 < share < 1 for share in shares)
    if vectors.shape != (len(shares), width) or not shares or not vectors.isfinite().all() or not falling:
        raise ArtifactError(
            f"{source}: the final mean should be one vector of {width} finite numbers "
            "for each share, shares falling and between 0 and 1"
        )
    return FinalMean(tuple(shares), vectors)
