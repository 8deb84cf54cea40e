"""The order in which whole heads are given up, each time the one that the others replace best.

Pure maths in float64, on the device of the data. Shape legend: C outputs, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stratavit.elastic.compensation import cholesky


def head_order(weight: Tensor, covariance: Tensor) -> Tensor:
    """Heads by greedy backward elimination, most important first, ``[H]``.

    As `elimination.elimination_order`, a head at a time: the one of least ``tr(W_h (P_hh)^-1 W_h^T)`` leaves, P the
    inverse of the covariance of what is left, W the corrected map. Nothing is asked of the device on the way.

    Args:
        weight: Of `proj`, by channel of a head, ``[C, d, H]`` float64, scaled by LayerScale if there is one.
        covariance: Of what it reads, in the same order, ``[d*H, d*H]``.
    """
    width, heads = weight.shape[1:]
    inverse = torch.cholesky_inverse(cholesky(covariance.to(weight))[0])
    inverse = inverse.unflatten(0, (width, heads)).unflatten(2, (width, heads)).permute(1, 0, 3, 2)  # [H, d, H, d]
    columns = weight.permute(2, 1, 0)  # [H, d, C]
    numbers, one = torch.arange(heads, device=weight.device), torch.eye(width, dtype=weight.dtype, device=weight.device)
    gone, order = torch.zeros(heads, dtype=torch.bool, device=weight.device), []
    for _ in range(heads):
        blocks = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1) + gone[:, None, None] * one  # [H, d, d]
        solved = torch.linalg.solve(blocks, columns)  # [H, d, C]
        worst = (columns * solved).sum(dim=(1, 2)).masked_fill(gone, torch.inf).argmin().unsqueeze(0)
        order.append(worst)
        others = inverse.index_select(2, worst).squeeze(2)  # [H, d, d]
        columns = columns - others @ solved.index_select(0, worst)
        change = torch.linalg.solve(blocks.index_select(0, worst), others.mT)  # [H, d, d]: (P_gg)^-1 P_gh
        inverse = inverse - torch.einsum("hij,gjk->higk", others, change)
        gone = gone | (numbers == worst)
    return torch.cat(order).flip(0)
