"""Coordinates for cuts that are compensated: sorted by what a module adds to the residual stream.

Pure maths in float64. Shape legend: C outputs, d coordinates of one head, m hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stratavit.elastic.compensation import cholesky

FLOOR = 1e-6  # of the largest eigenvalue of the head output's covariance
BALANCE_FLOOR = 1e-4  # of the largest singular value, where the two sides are balanced


def output_axes(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of a head's values whose first w carry most of what the head writes, for every w.

    With S the covariance of the head's output and W its part of `proj`, ``W S^(1/2) = P Sigma Q^T``: dropping the
    last coordinates of ``T = D Q^T S^(-1/2)`` loses the smallest singular values, and the kept ones are uncorrelated
    with the dropped. ``D = Sigma^(1/2)`` shares the scale between both sides, so that neither leaves the range of half
    precision. Eigenvalues are floored, so that T stays invertible and the function is preserved.

    Args:
        weight: ``[C, d]``.
        covariance: ``[d, d]``.

    Returns:
        T and its inverse, ``[d, d]`` float64: ``W_v <- T W_v``, ``W <- W T^-1``.
    """
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    values = values.clamp_min(FLOOR * max(float(values[-1]), torch.finfo(torch.float32).tiny))
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    _, sigma, axes = torch.linalg.svd(weight.double().cpu() @ root, full_matrices=True)
    spread = F.pad(sigma, (0, len(values) - len(sigma)))  # fewer outputs than coordinates leave zeros
    largest = float(spread[0])
    if largest > 0:
        balance = (spread / largest).clamp_min(BALANCE_FLOOR).sqrt() * largest**0.5
    else:
        balance = torch.ones_like(spread)
    axes = axes * torch.where(axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    forward, backward = (balance[:, None] * axes) @ inverse, root @ (axes.T / balance)
    return forward.to(weight.device), backward.to(weight.device)


def elimination_order(weight: Tensor, covariance: Tensor, block: int = 64) -> Tensor:
    """Hidden channels by greedy backward elimination, most important first, ``[m]``.

    Each step removes the channel whose loss is least *after* the others make up for it: ``|w_j|^2 / P_jj``, with P the
    inverse of the covariance of what is left and w_j the channel's column of the corrected map. Map and inverse are
    updated as in the optimal brain surgeon; updates of rank one are gathered and applied in blocks.

    Args:
        weight: ``fc2``, ``[C, m]``, scaled by LayerScale if there is one.
        covariance: Of the post-activations, ``[m, m]``.
        block: Eliminations between two full updates.
    """
    inverse = torch.cholesky_inverse(cholesky(covariance)[0])
    weight = weight.to(inverse).clone()
    alive = torch.arange(len(inverse), device=inverse.device)
    leaving: list[Tensor] = []
    while len(alive):
        gone = _eliminate(weight, inverse, min(block, len(alive)))
        left = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        left[gone] = False
        leaving.append(alive[gone])
        alive, weight, inverse = alive[left], weight[:, left], inverse[left][:, left]
    return torch.cat(leaving).flip(0)


def _eliminate(weight: Tensor, inverse: Tensor, steps: int) -> Tensor:
    """Indices of the next `steps` channels to leave; `weight` ``[C, m]`` and `inverse` ``[m, m]`` change in place."""
    u = inverse.new_zeros(len(inverse), steps)  # inverse - u u^T and weight - v u^T are the current ones
    v = weight.new_zeros(len(weight), steps)
    diagonal, norms = inverse.diagonal().clone(), weight.square().sum(dim=0)
    gone: list[int] = []
    for step in range(steps):
        loss = norms.clamp_min(0) / diagonal.clamp_min(torch.finfo(torch.float64).tiny)
        loss[gone] = torch.inf
        j = int(loss.argmin())
        gone.append(j)
        scale = diagonal[j].clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        row = (inverse[:, j] - u[:, :step] @ u[j, :step]) * scale  # [m]
        column = (weight[:, j] - v[:, :step] @ u[j, :step]) * scale  # [C]
        cross = column @ weight - (column @ v[:, :step]) @ u[:, :step].T  # [m]: v . w_i
        norms = norms - 2 * row * cross + row.square() * column.square().sum()
        diagonal = diagonal - row.square()
        u[:, step], v[:, step] = row, column
    inverse -= u @ u.T
    weight -= v @ u.T
    return torch.tensor(gone, device=inverse.device)
