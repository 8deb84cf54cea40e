"""WPAC: weighted PCA for attention contraction, and baselines. Pure maths from statistics to a change of coordinates.

Source: method section 1 (arXiv 2511.11683, WPAC). In float64.

Shape legend: H heads, d head_dim, m MLP hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stratavit.calibration.site_observer import Scatter, SiteStatistics
from stratavit.choices import CRITERIA as CRITERIA
from stratavit.choices import Criterion as Criterion
from stratavit.elastic.exchanged import AttentionTransform


def scatter_needed(criterion: Criterion) -> Scatter:
    """Which q, k, v scatter the calibration pass must gather for a criterion."""
    scatters: dict[str, Scatter] = {"output": "weighted", "wpac": "weighted", "pca": "plain"}
    return scatters.get(criterion, "none")


def principal_axes(scatter: Tensor) -> Tensor:
    """Orthonormal eigenvectors of ``[..., d, d]`` scatters as columns, largest eigenvalue first.

    Signs are fixed (largest entry of each axis positive): they do not depend on the linear-algebra library.
    """
    axes = torch.linalg.eigh(scatter.double().cpu()).eigenvectors.flip(-1)
    peak = axes.gather(-2, axes.abs().argmax(dim=-2, keepdim=True))
    return (axes * torch.where(peak < 0, -1.0, 1.0)).to(scatter.device)


def attention_transform(
    statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator
) -> AttentionTransform:
    """Coordinates of an attention module, most important first, in float64.

    Args:
        statistics: Of the site; `scatter` is needed for ``wpac`` and ``pca``.
        criterion: ``wpac`` (the paper), ``pca`` (the same, all tokens weighted alike), or a ranking of the
            coordinates as they are: ``taylor``, ``hessian``, ``magnitude``, ``random``.
        norms: L2 norms of each coordinate's weights for q, k, v, ``[3, H, d]``, or for v alone, where q and k stay
            uncut, ``[1, H, d]``; for ``magnitude``.
        generator: For ``random``.
    """
    turned = criterion in ("wpac", "pca")
    axes_of: Callable[[Tensor], Tensor] = principal_axes if turned else _sorting_axes
    found = statistics.scatter if turned else _scores(statistics, criterion, norms, generator)
    assert found is not None
    *qk, v = found
    turn = axes_of(qk[0] + qk[1]).transpose(-1, -2) if qk else None
    axes = axes_of(v)
    return AttentionTransform(q=turn, k=turn, v=axes.transpose(-1, -2), o=axes)


def mlp_order(statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator) -> Tensor:
    """Hidden units of an MLP, most important first, ``[m]``; ``wpac`` and ``pca`` use ``hessian``, as the reference."""
    ranking: Criterion = "hessian" if criterion in ("wpac", "pca") else criterion
    return _descending(_scores(statistics, ranking, norms, generator).flatten())


def _scores(statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator) -> Tensor:
    if criterion == "random":
        return torch.rand(norms.shape, generator=generator, dtype=torch.float64)
    return {"taylor": statistics.taylor, "hessian": statistics.hessian, "magnitude": norms}[criterion]


def _sorting_axes(scores: Tensor) -> Tensor:
    """Axes ``[H, d, d]`` that sort coordinates by their scores ``[H, d]``: column i picks the i-th coordinate."""
    return F.one_hot(_descending(scores), scores.shape[-1]).transpose(-1, -2).double()


def _descending(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices
