"""The statistics of a super-network's channels as tensors for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.compensation import Moments
from stratavit.elastic.delta import Delta
from stratavit.elastic.rotary import ElasticRotary
from stratavit.elastic.site import Site
from stratavit.errors import ArtifactError, shown
from stratavit.files.state_dicts import FLOATS
from stratavit.models.final_mean import FinalMean

FACTOR = ".factor"
PARTS = (".mean", FACTOR, ".scalars")
DELTA, PAIRS = ".delta.", ".pairs"
SHARES, VECTORS = "final_mean.shares", "final_mean.vectors"


def to_tensors(
    elastic: Mapping[str, ElasticSite], final_mean: FinalMean | None, second: bool = True
) -> dict[str, Tensor]:
    """``SITE.mean``; ``SITE.factor`` (lower triangle, row by row) and ``SITE.scalars`` (ridge, energy); the final mean.

    Also ``SITE.delta.PART``: what recovery of all sizes has learned, and ``SITE.pairs``: the order of rotation pairs.

    Args:
        elastic: Site name -> module.
        final_mean: Of the super-network, if any.
        second: Include second moments (the factors), which are most of the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in elastic.items():
        if module.channel_mean.numel():
            tensors[f"{name}.mean"] = module.channel_mean
        if isinstance(module, ElasticRotary):
            tensors[name + PAIRS] = module.pairs.float()
        if module.delta is not None:
            tensors |= {f"{name}{DELTA}{part}": t for part, t in module.delta.named_buffers()}
        if second and module.moments is not None:
            tensors[f"{name}{FACTOR}"] = packed(module.moments.factor)
            scalars = [module.moments.ridge, module.moments.energy]
            tensors[f"{name}.scalars"] = torch.tensor(scalars, dtype=torch.float64)
    if second and final_mean is not None:
        tensors[SHARES] = torch.tensor(final_mean.shares, dtype=torch.float64)
        tensors[VECTORS] = final_mean.vectors
    return tensors


def from_tensors(
    elastic: Mapping[str, ElasticSite], sites: Sequence[Site], width: int, tensors: Mapping[str, Tensor], source: str
) -> FinalMean | None:
    """Sets on the sites of a super-network what `to_tensors` wrote.

    Args:
        elastic, sites: The sites by name, and in order.
        width: Of the head's input.
        tensors, source: From the file, and its name for the message.

    Returns:
        The final mean, if the file has one.

    Raises:
        ArtifactError: A tensor does not fit the model or is not finite; it is named.
    """
    deltas = {}
    if any(DELTA in name for name in tensors):
        deltas = {name: Delta(module.weights_at(module.full_width)) for name, module in elastic.items()}
    known = _layout(elastic, sites, width, tensors, deltas)
    for name, tensor in sorted(tensors.items()):
        if name not in known:
            raise ArtifactError(f"{source}: {shown(name)} is not part of this model; copy the file or save it again")
        shape, dtype = known[name]
        fits = tensor.dtype in FLOATS and tensor.shape == shape
        if not fits or not tensor.to(dtype).isfinite().all():  # what is finite in a wider type may not be in this one
            found = f"{tuple(tensor.shape)} of type {tensor.dtype}".replace("torch.", "")
            raise ArtifactError(f"{source}: {name} should be {shape} finite numbers, got {found}")
    second = any(name.endswith(FACTOR) for name in tensors)
    for site in sites:
        names = [f"{site.name}{part}" for part in PARTS]
        missing = [name for name in names if second and name not in tensors]
        if missing:
            raise ArtifactError(f"{source}: {missing[0]} is missing, other second moments are there; save it again")
        module = elastic[site.name]
        if names[0] in tensors:
            module.channel_mean = tensors[names[0]].to(module.out.weight)
        if isinstance(module, ElasticRotary):
            module.pairs = _order(site, tensors, source).to(module.out.weight.device)
        if second:
            module.moments = _moments(site, tensors, source).to(module.out.weight.device)
        if f"{site.name}{DELTA}out_weight" in tensors:
            module.delta = _filled(deltas[site.name], f"{site.name}{DELTA}", tensors, source)
    return _final_mean(tensors, source) if VECTORS in tensors else None


def packed(factor: Tensor) -> Tensor:
    """The lower triangle of ``[n, n]``, row by row, ``[n (n+1) / 2]``."""
    return torch.cat([row[: index + 1] for index, row in enumerate(factor)])


def unpacked(triangle: Tensor, n: int) -> Tensor:
    """``[n, n]`` from its lower triangle."""
    lower = torch.ones(n, n, dtype=torch.bool, device=triangle.device).tril_()
    return triangle.new_zeros(n, n).masked_scatter_(lower, triangle)


def _layout(
    elastic: Mapping[str, ElasticSite],
    sites: Sequence[Site],
    width: int,
    tensors: Mapping[str, Tensor],
    deltas: Mapping[str, Delta],
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and type in use, of every tensor that a file may have."""
    shares = tensors[SHARES].numel() if SHARES in tensors else 0
    found = {SHARES: ((shares,), torch.float64), VECTORS: ((shares, width), torch.float32)}
    for site in sites:
        n, mean = site.heads * site.width, elastic[site.name].out.weight.dtype
        if site.rotary:
            found[site.name + PAIRS] = (site.width // 2,), torch.float32
        found[f"{site.name}.mean"] = (site.heads, site.width), mean
        found[f"{site.name}{FACTOR}"] = (n * (n + 1) // 2,), torch.float32
        found[f"{site.name}.scalars"] = (2,), torch.float64
    for name, delta in deltas.items():
        found |= {f"{name}{DELTA}{part}": (tuple(t.shape), t.dtype) for part, t in delta.named_buffers()}
    return found


def _moments(site: Site, tensors: Mapping[str, Tensor], source: str) -> Moments:
    triangle = tensors[f"{site.name}{FACTOR}"]
    factor = unpacked(triangle, site.heads * site.width)
    ridge, energy = tensors[f"{site.name}.scalars"].tolist()
    if triangle.dtype != torch.float32 or not (factor.diagonal() > 0).all():
        raise ArtifactError(f"{source}: {site.name}{FACTOR} should be the triangle of a Cholesky factor, float32")
    if min(ridge, energy) < 0:
        raise ArtifactError(f"{source}: {site.name}.scalars should be at least 0")
    return Moments(factor, ridge, energy)


def _order(site: Site, tensors: Mapping[str, Tensor], source: str) -> Tensor:
    """The order of a site's rotation pairs."""
    count, name = site.width // 2, site.name + PAIRS
    if name not in tensors:  # of a release that did not cut q and k, so the list means other networks
        raise ArtifactError(f"{source}: {name} is missing; convert the model again")
    order = tensors[name].double()
    if not torch.equal(order.sort().values, torch.arange(count, device=order.device).double()):
        raise ArtifactError(f"{source}: {name} should be the numbers from 0 to {count - 1} in some order")
    return order.long()


def _filled(delta: Delta, start: str, tensors: Mapping[str, Tensor], source: str) -> Delta:
    """A change of weights with its tensors, whose names begin so."""
    for part, zeros in delta.named_buffers():
        if start + part not in tensors:
            raise ArtifactError(
                f"{source}: {start}{part} is missing, other changes of weights are there; save it again"
            )
        zeros.copy_(tensors[start + part])
    return delta


def _final_mean(tensors: Mapping[str, Tensor], source: str) -> FinalMean:
    shares = tensors[SHARES].tolist() if SHARES in tensors else []
    if not shares or shares != sorted(set(shares), reverse=True) or not 0 < shares[-1] <= shares[0] < 1:
        raise ArtifactError(f"{source}: {SHARES} should be falling and between 0 and 1")
    return FinalMean(tuple(shares), tensors[VECTORS].float())
