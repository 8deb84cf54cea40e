"""WPAC: weighted PCA for attention contraction, and baselines. Pure maths from statistics to a change of coordinates.

Source: method section 1 (arXiv 2511.11683, WPAC). Everything is float64; nothing here touches a model.

Shape legend: H heads, d head_dim, C token width, m MLP hidden width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stratavit.calibration.statistics import Scatter, SiteStatistics
from stratavit.elastic.base import AttentionTransform

Criterion = Literal["output", "wpac", "random", "magnitude", "taylor", "hessian", "pca"]
CRITERIA: tuple[Criterion, ...] = ("output", "wpac", "random", "magnitude", "taylor", "hessian", "pca")


def scatter_needed(criterion: Criterion) -> Scatter:
    """Which q, k, v scatter a criterion asks of the calibration pass."""
    scatters: dict[str, Scatter] = {"output": "weighted", "wpac": "weighted", "pca": "plain"}
    return scatters.get(criterion, "none")


def principal_axes(scatter: Tensor) -> Tensor:
    """Orthonormal eigenvectors of ``[..., d, d]`` scatters as columns, largest eigenvalue first.

    Signs are fixed (largest entry of each axis positive), so that the result does not depend on the
    linear-algebra library's choice.
    """
    axes = torch.linalg.eigh(scatter.double().cpu()).eigenvectors.flip(-1)
    peak = axes.gather(-2, axes.abs().argmax(dim=-2, keepdim=True))
    return (axes * torch.where(peak < 0, -1.0, 1.0)).to(scatter.device)


def rotation(v_axes: Tensor, qk_axes: Tensor | None) -> AttentionTransform:
    """The transform that expresses v in `v_axes`, q and k in `qk_axes` (orthonormal columns, ``[H, d, d]``)."""
    qk = None if qk_axes is None else qk_axes.transpose(-1, -2)
    return AttentionTransform(q=qk, k=qk, v=v_axes.transpose(-1, -2), o=v_axes)


def selection(order: Tensor) -> Tensor:
    """Axes that sort coordinates: column i of ``[H, d, d]`` picks coordinate ``order[:, i]``."""
    return torch.nn.functional.one_hot(order, order.shape[-1]).transpose(-1, -2).double()


def attention_transform(
    statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator
) -> AttentionTransform:
    """Coordinates of an attention module, most important first.

    Args:
        statistics: Of the site; `scatter` is needed for ``wpac`` and ``pca``.
        criterion: ``wpac`` (the paper), ``pca`` (the same, all tokens weighted alike), or a ranking of the
            coordinates as they are: ``taylor``, ``hessian``, ``magnitude``, ``random``.
        norms: L2 norms of each coordinate's weights for q, k, v, ``[3, H, d]``, or for v alone, where q and k stay
            whole, ``[1, H, d]``; for ``magnitude``.
        generator: For ``random``.
    """
    if criterion in ("wpac", "pca"):
        assert statistics.scatter is not None
        *qk, v = statistics.scatter
        return rotation(principal_axes(v), principal_axes(qk[0] + qk[1]) if qk else None)
    *qk, v = _scores(statistics, criterion, norms, generator)
    return rotation(selection(_descending(v)), selection(_descending(qk[0] + qk[1])) if qk else None)


def mlp_order(statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator) -> Tensor:
    """Hidden units of an MLP, most important first, ``[m]``.

    ``wpac`` and ``pca`` use the second-order Taylor term, as the reference does.
    """
    mlp_criterion: Criterion = "hessian" if criterion in ("wpac", "pca") else criterion
    return _descending(_scores(statistics, mlp_criterion, norms, generator).flatten())


def _scores(statistics: SiteStatistics, criterion: Criterion, norms: Tensor, generator: torch.Generator) -> Tensor:
    scores = {"taylor": statistics.taylor, "hessian": statistics.hessian, "magnitude": norms}
    if criterion == "random":
        return torch.rand(norms.shape, generator=generator, dtype=torch.float64)
    return scores[criterion]


def _descending(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices
