"""Folds a change of coordinates into the weights of elastic modules. The function stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from stratavit.calibration.output_aware import elimination_order, output_axes
from stratavit.calibration.statistics import SiteStatistics
from stratavit.calibration.wpac import Criterion, attention_transform, mlp_order, principal_axes
from stratavit.elastic.base import AttentionTransform, ElasticSite
from stratavit.elastic.compensation import Moments, factorise
from stratavit.models.families import layer_scale
from stratavit.utils.progress import track


@torch.no_grad()
def apply(model: nn.Module, statistics: Mapping[str, SiteStatistics], criterion: Criterion, seed: int) -> None:
    """Re-parameterises every site of a model in place.

    Args:
        model: Its sites are elastic modules.
        statistics: Of each site, from one calibration pass; with covariances for ``output``.
        criterion: What channels are sorted by.
        seed: For the ``random`` criterion.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, found in track(statistics.items(), "sort channels"):
        module = model.get_submodule(name)
        assert isinstance(module, ElasticSite)
        module.moments, module.crossed = None, ()
        module.forget_last()
        if criterion == "output":
            _sort_by_output(module, found, layer_scale(model, name))
        elif module.attention:
            transform = attention_transform(found, criterion, module.norms(), generator)
            module.fold(transform)
            set_mean(module, _turned_mean(found.channel_mean, transform.v.to(found.channel_mean)))
        else:
            order = mlp_order(found, criterion, module.norms(), generator)
            module.permute(order)
            set_mean(module, found.channel_mean[:, order.to(found.channel_mean.device)])  # [1, m]


def _sort_by_output(module: ElasticSite, found: SiteStatistics, scale: Tensor | None) -> None:
    """Output-aware coordinates of one site, and the moments of its channels in these coordinates."""
    assert found.covariance is not None
    assert found.crossed is not None
    covariance, mean = found.covariance, found.channel_mean
    scale = None if scale is None else scale.to(covariance)
    if module.attention:
        qk = None if found.scatter is None else principal_axes(found.scatter.sum(dim=0)).transpose(-1, -2)
        parts = module.out_by_head().to(covariance)  # [C, H, d]
        parts = parts if scale is None else parts * scale[:, None, None]
        blocks = covariance.unflatten(0, mean.shape).unflatten(2, mean.shape)  # [H, d, H, d]
        axes = [output_axes(parts[:, h], blocks[h, :, h]) for h in range(module.heads)]
        v, o = (torch.stack(side).to(mean) for side in zip(*axes, strict=True))
        module.fold(AttentionTransform(qk, qk, v, o))
        change = partial(_turned, matrix=v)
    else:
        weight = module.out.weight.to(covariance)
        order = elimination_order(weight if scale is None else weight * scale[:, None], covariance)
        module.permute(order)
        change = partial(_sorted, order=order)
    weight = module.out_by_coordinate()
    channels = []
    for pair in ((mean, covariance), *found.crossed):
        new_mean, new_covariance = change(*pair)
        moments = factorise(new_covariance, weight).to(module.out.weight.device)
        channels.append((new_mean.to(module.out.weight), moments))
    (module.channel_mean, module.moments), *crossed = channels
    module.crossed = tuple(crossed)


def moments_of(module: ElasticSite, found: SiteStatistics) -> tuple[Tensor, Moments]:
    """Mean ``[H, d]`` and moments of a site's channels as they are, nothing turned or sorted.

    Args:
        module: The site.
        found: Its statistics, with a covariance.
    """
    assert found.covariance is not None
    shape = found.channel_mean.shape
    covariance = found.covariance.unflatten(0, shape).unflatten(2, shape).permute(1, 0, 3, 2)  # [d, H, d, H]
    moments = factorise(covariance.flatten(2).flatten(0, 1), module.out_by_coordinate().detach())
    return found.channel_mean, moments.to(module.out.weight.device)


def _turned(mean: Tensor, covariance: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Moments after ``[H, d, d]`` turned each head: mean ``[H, d]``, covariance coordinate-major ``[d*H, d*H]``."""
    blocks = covariance.unflatten(0, mean.shape).unflatten(2, mean.shape)  # [H, d, H, d]
    turned = torch.einsum("hij,hjgk,glk->ihlg", matrix, blocks, matrix)  # [d, H, d, H]
    return _turned_mean(mean, matrix), turned.flatten(2).flatten(0, 1)


def _turned_mean(mean: Tensor, matrix: Tensor) -> Tensor:
    """Mean ``[H, d]`` after ``[H, d, d]`` turned each head."""
    return (matrix @ mean.unsqueeze(-1)).squeeze(-1)


def _sorted(mean: Tensor, covariance: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of permuted channels: mean ``[1, m]``, covariance ``[m, m]``."""
    return mean[:, order], covariance[order][:, order]


def set_mean(module: ElasticSite, mean: Tensor) -> None:
    """Gives a module the mean of the channels that its `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``."""
    module.channel_mean = mean.to(module.out.weight)
