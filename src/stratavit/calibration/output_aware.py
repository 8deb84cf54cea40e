"""Coordinates for cuts that are compensated: sorted by what a module adds to the residual stream.

Pure maths in float64. Shape legend: C outputs, d coordinates of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stratavit.calibration.accumulators import wide

FLOOR = 1e-6  # of the largest eigenvalue of the head output's covariance
BALANCE_FLOOR = 1e-4  # of the largest singular value, where the two sides are balanced


def output_axes(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of a head's values whose first w carry most of what the head writes, for every w.

    With S the covariance of the head's output and W its part of `proj`, ``W S^(1/2) = P Sigma Q^T``: dropping the
    last coordinates of ``T = D Q^T S^(-1/2)`` loses the smallest singular values, and the kept ones are uncorrelated
    with the dropped. ``D = Sigma^(1/2)`` shares the scale between both sides, so that neither leaves the range of half
    precision. Eigenvalues are floored, so that T stays invertible and the function is preserved.

    Sigma and Q come from ``S^(1/2) W^T W S^(1/2)``: in float64 a singular value above `BALANCE_FLOOR` of the largest
    keeps 8 digits. What is decomposed is small (d is at most a few hundred), so that the CPU is faster than any GPU:
    all heads go there and back in one transfer.

    Args:
        weight: ``[..., C, d]``.
        covariance: ``[..., d, d]``.

    Returns:
        T and its inverse, ``[..., d, d]`` float64: ``W_v <- T W_v``, ``W <- W T^-1``.
    """
    weight = wide(weight)
    covariance, gram = torch.stack([wide(covariance), weight.mT @ weight]).cpu()
    values, vectors = torch.linalg.eigh(covariance)
    values = torch.maximum(values, FLOOR * values[..., -1:].clamp_min(torch.finfo(torch.float32).tiny))
    values = values.sqrt().unsqueeze(-2)
    root, inverse = (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT
    sigma, axes = torch.linalg.eigh(root @ gram @ root)
    sigma, axes = sigma.flip(-1).clamp_min(0).sqrt(), axes.flip(-1).mT  # largest first; axes are rows
    largest = sigma[..., :1]
    balance = torch.where(largest > 0, torch.maximum(sigma, BALANCE_FLOOR * largest), 1.0).sqrt().unsqueeze(-1)
    peak = axes.gather(-1, axes.abs().argmax(dim=-1, keepdim=True))
    axes = axes * torch.where(peak < 0, -1.0, 1.0)
    found = (balance * axes) @ inverse, root @ (axes / balance).mT
    there, back = torch.stack(found).to(weight.device)
    return there, back
