"""The first step of a conversion: channels are sorted inside every module, the function is kept. No training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import Objective
from stratavit.calibration.output_aware import elimination_order, output_axes
from stratavit.calibration.statistics import SiteStatistics, collect
from stratavit.calibration.wpac import (
    CRITERIA,
    Criterion,
    attention_transform,
    mlp_order,
    principal_axes,
    scatter_needed,
)
from stratavit.elastic.base import AttentionTransform, ElasticSite
from stratavit.elastic.compensation import Moments, factorise
from stratavit.elastic.network import site_of
from stratavit.errors import StrataViTError, described
from stratavit.models.families import layer_scale
from stratavit.utils.progress import track

Method = Literal["default", "paper"]
TOKEN_WEIGHT = 0.5


def known_method(method: Method) -> Method:
    """The same; a `StrataViTError` if it is neither of the two."""
    if method not in get_args(Method):
        raise StrataViTError(f"method: expected 'default' or 'paper', got {described(method)}")
    return method


def resolve_method(method: Method | None, criterion: Criterion | None) -> tuple[Method, Criterion]:
    """The method and the criterion that go together, where one or both are left out.

    Raises:
        StrataViTError: One is unknown, or they belong to different methods.
    """
    if criterion is not None and criterion not in CRITERIA:
        raise StrataViTError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    implied: Method = "default" if criterion in (None, "output") else "paper"
    method = implied if method is None else known_method(method)
    if criterion is not None and method != implied:
        raise StrataViTError(f"criterion {criterion!r} belongs to method={implied!r}, got method={method!r}")
    return method, criterion or ("output" if method == "default" else "wpac")


def sort_channels(
    model: nn.Module, loader: Iterable[Any], criterion: Criterion, objective: Objective, seed: int, token_weight: float
) -> tuple[dict[str, Any], DenseOutputs | None]:
    """Sorts the channels of every site in place, from one pass over the calibration images.

    Args:
        model, loader, objective: See `statistics.collect`.
        criterion: What channels are sorted by.
        seed: For ``random`` and for the objective ``sampled``.
        token_weight: For ``output``: share of a token's weight that follows the gradient norm at the module's output.

    Returns:
        Facts for the provenance; with ``output`` the dense model's outputs, which the pass computes anyway.

    Raises:
        StrataViTError: Bad images, labels or options.
    """
    if not 0 <= token_weight <= 1:
        raise StrataViTError(f"token_weight: expected a share from 0 to 1, got {token_weight!r}")
    share = token_weight if criterion == "output" else None
    dense_outputs = None if share is None else DenseOutputs()
    statistics = collect(model, loader, objective, scatter_needed(criterion), "contract", share, seed, dense_outputs)
    generator = torch.Generator().manual_seed(seed)
    for name, found in track(statistics.items(), "sort channels"):
        _sort_site(site_of(model, name), found, criterion, layer_scale(model, name), generator)
    images = next(iter(statistics.values())).images
    facts = {"criterion": criterion, "objective": objective, "images": images, "seed": seed, "token_weight": share}
    return facts, dense_outputs


@torch.no_grad()
def _sort_site(
    module: ElasticSite, found: SiteStatistics, criterion: Criterion, scale: Tensor | None, generator: torch.Generator
) -> None:
    """Folds new coordinates into the weights, and keeps means and moments in these coordinates."""
    module.forget()
    mean, new = found.channel_mean, _new_coordinates(module, found, criterion, scale, generator)
    if isinstance(new, AttentionTransform):
        module.fold(new)
        new = new.v
    else:
        module.permute(new)
    new = new.to(mean.device)
    set_mean(module, _moved_mean(new, mean))
    if found.covariance is not None:
        module.moments = _moments(module, _moved_covariance(new, found.covariance))
        module.crossed = tuple(
            (_moved_mean(new, m).to(module.out.weight), _moments(module, _moved_covariance(new, c)))
            for m, c in found.crossed
        )


def _new_coordinates(
    module: ElasticSite, found: SiteStatistics, criterion: Criterion, scale: Tensor | None, generator: torch.Generator
) -> AttentionTransform | Tensor:
    """The transform of an attention module, or the order ``[m]`` of an MLP's channels; `scale` is the LayerScale."""
    if criterion != "output":
        choose = attention_transform if module.attention else mlp_order
        return choose(found, criterion, module.norms(), generator)
    mean, covariance = found.channel_mean, found.covariance
    assert covariance is not None
    weight = module.out_by_head().to(covariance)  # [C, H, d]
    weight = weight if scale is None else weight * scale.to(covariance)[:, None, None]
    if not module.attention:
        return elimination_order(weight.flatten(1), covariance)
    qk = None if found.scatter is None else principal_axes(found.scatter.sum(dim=0)).transpose(-1, -2)
    blocks = covariance.unflatten(0, mean.shape).unflatten(2, mean.shape)  # [H, d, H, d]
    axes = [output_axes(weight[:, h], blocks[h, :, h]) for h in range(module.heads)]
    v, o = (torch.stack(side).to(mean) for side in zip(*axes, strict=True))
    return AttentionTransform(qk, qk, v, o)


def _moved_mean(new: Tensor, mean: Tensor) -> Tensor:
    """Mean ``[H, d]`` or ``[1, m]`` after heads were turned by `new` ``[H, d, d]``, or channels ordered by ``[m]``."""
    return mean[:, new] if new.dim() == 1 else (new.to(mean) @ mean.unsqueeze(-1)).squeeze(-1)


def _moved_covariance(new: Tensor, covariance: Tensor) -> Tensor:
    """Covariance ``[H*d, H*d]`` or ``[m, m]`` after the same."""
    if new.dim() == 1:
        return covariance[new][:, new]
    shape, turn = new.shape[:2], new.to(covariance)
    blocks = covariance.unflatten(0, shape).unflatten(2, shape)  # [H, d, H, d]
    return torch.einsum("hij,hjgk,glk->higl", turn, blocks, turn).flatten(2).flatten(0, 1)


def moments_of(module: ElasticSite, found: SiteStatistics) -> tuple[Tensor, Moments]:
    """Mean ``[H, d]`` and moments of a site's channels in their coordinates, from statistics with a covariance."""
    assert found.covariance is not None
    return found.channel_mean, _moments(module, found.covariance)


def _moments(module: ElasticSite, covariance: Tensor) -> Moments:
    """Moments, coordinate-major, of channels whose covariance ``[H*d, H*d]`` is head-major."""
    shape = (module.heads, -1)
    blocks = covariance.unflatten(0, shape).unflatten(2, shape).permute(1, 0, 3, 2)  # [d, H, d, H]
    moments = factorise(blocks.flatten(2).flatten(0, 1), module.out_by_coordinate().detach())
    return moments.to(module.out.weight.device)


def set_mean(module: ElasticSite, mean: Tensor) -> None:
    """Gives a module the mean of the channels that its `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``."""
    module.channel_mean = mean.to(module.out.weight)
