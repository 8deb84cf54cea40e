"""The order in which hidden channels of an MLP are given up, each time the one that the others replace best.

Pure maths on the device of the data and in its precision, for several sites of one shape at a time: nothing is asked
of the device while it runs. Shape legend: S sites, C outputs, m hidden channels, n of them left, c candidates, b of a
block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from stratavit.elastic.compensation import attempt, cholesky
from stratavit.utils.devices import queues_work

BLOCK = 64  # channels between two updates of all others
CANDIDATES = 4  # times the block: channels among which its members are chosen one by one


def elimination_order(
    weight: Tensor, covariance: Iterable[Tensor], block: int = BLOCK, candidates: int = CANDIDATES
) -> Tensor:
    """Hidden channels by greedy backward elimination, most important first, ``[S, m]``.

    Each step removes the channel whose loss is least *after* the others make up for it: ``|w_j|^2 / P_jj``, with P the
    inverse of the covariance of what is left and w_j the channel's column of the corrected map. Map and inverse are
    updated as in the optimal brain surgeon. A block of channels leaves between two updates of all: those of least loss
    are its candidates, and its members are chosen among these one by one, exactly, as if there were no other channels.
    With a block of one, or with all channels as candidates, that is the greedy order.

    Args:
        weight: ``fc2`` of each site, ``[S, C, m]``, scaled by LayerScale if there is one; its precision is that of the
            whole computation. On real weights float32 chose the channels that float64 did.
        covariance: Of the post-activations, ``[m, m]`` of each site, one at a time; gone through once more if one of
            them has no factor.
        block: Channels that leave between two updates.
        candidates: Number of candidates, in blocks.
    """
    sites, outputs, left = weight.shape
    table = weight.new_empty(sites, left, outputs + left, dtype=weight.dtype)  # [S, m, C + m]: W^T next to P
    table[:, :, :outputs] = weight.mT
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=(1, 2), keepdim=True)
    table[:, :, :outputs] /= largest.clamp_min(torch.finfo(weight.dtype).tiny)
    _invert(table[:, :, outputs:], covariance)
    channels = torch.arange(left, device=table.device).repeat(sites, 1)  # [S, m]: in the order of the table's rows
    leaving: list[Tensor] = []
    while left:
        current = table[:, :left, : outputs + left]
        gone, root = _choose(current, outputs, min(block, left), min(block * candidates, left))
        leaving.append(channels.gather(1, gone))
        left -= gone.shape[1]
        _remove(current, channels, outputs, gone, root)
    return torch.cat(leaving, dim=1).flip(1)


def _invert(inverse: Tensor, covariance: Iterable[Tensor]) -> None:
    """Fills ``[S, m, m]`` with the inverses of covariances, regularised, of mean variance 1.

    A device that queues work is read once.
    """
    if not queues_work(inverse.device):
        for own, matrix in zip(inverse, covariance, strict=True):
            _fill(own, matrix, torch.cholesky_inverse(cholesky(matrix.to(own.dtype))[0]))
        return
    failed = []
    for own, matrix in zip(inverse, covariance, strict=True):
        found = attempt(matrix.to(own.dtype))
        _fill(own, matrix, _inverse_of(found.factor))
        failed.append(found.failed)
    numbers = torch.stack(failed).tolist()
    for own, matrix, number in zip(inverse, covariance, numbers, strict=True) if any(numbers) else ():
        if number:
            _fill(own, matrix, _inverse_of(cholesky(matrix)[0]))


def _fill(own: Tensor, matrix: Tensor, inverse: Tensor) -> None:
    """Writes the inverse of a covariance `matrix`, all ``[m, m]``, scaled: no loss leaves the range of float32."""
    own.copy_(inverse).mul_(matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))


def _inverse_of(factor: Tensor) -> Tensor:
    """The inverse of ``L L^T`` ``[m, m]``; `torch.cholesky_inverse` reads from the device whether L is singular."""
    return torch.cholesky_solve(torch.eye(len(factor), dtype=factor.dtype, device=factor.device), factor)


def _choose(table: Tensor, outputs: int, steps: int, count: int) -> tuple[Tensor, Tensor]:
    """The rows of `table` ``[S, n, C + n]`` that leave next, in order, ``[S, b]``.

    And the lower root ``[S, b, b]`` of their block of the inverse.
    """
    columns, inverse, tiny = table[:, :, :outputs], table[:, :, outputs:], torch.finfo(table.dtype).tiny
    loss = torch.linalg.vector_norm(columns, dim=2).square() / inverse.diagonal(dim1=1, dim2=2).clamp_min(tiny)
    chosen = loss.topk(count, dim=1, largest=False).indices  # [S, c]
    columns, inverse = _rows(columns, chosen), _rows(inverse, chosen)  # [S, c, C], [S, c, n]
    inverse = inverse.gather(2, chosen.unsqueeze(1).expand(-1, count, -1))  # [S, c, c]
    gone, root = _eliminate(columns @ columns.mT, inverse, steps)
    return chosen.gather(1, gone), root


def _eliminate(gram: Tensor, inverse: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Of candidates with inner products `gram` and `inverse`, ``[S, c, c]``, those that leave first: ``[S, b]``.

    And the lower root ``[S, b, b]`` of their block of the inverse. Both matrices change in place.
    """
    (sites, count), tiny = gram.shape[:2], torch.finfo(gram.dtype).tiny
    gone = torch.empty(sites, steps, dtype=torch.long, device=gram.device)
    roots = gram.new_empty(sites, count, steps)
    barred = gram.new_zeros(sites, count)
    norms, spread = gram.diagonal(dim1=1, dim2=2), inverse.diagonal(dim1=1, dim2=2)  # views
    for step in range(steps):
        j = (norms.clamp_min(0) / spread.clamp_min(tiny) + barred).argmin(dim=1, keepdim=True)  # [S, 1]
        gone[:, step : step + 1] = j
        barred.scatter_(1, j, torch.inf)
        row, cross = _rows(inverse, j), _rows(gram, j)  # [S, 1, c], both are symmetric
        row = row * row.gather(2, j.unsqueeze(1)).clamp_min(tiny).rsqrt()
        scale = row.gather(2, j.unsqueeze(1)).clamp_min(tiny)  # the root of the pivot
        cross = cross / scale
        cross -= row * (cross.gather(2, j.unsqueeze(1)) / (2 * scale))
        inverse.baddbmm_(row.mT, row, alpha=-1)
        pair, swapped = torch.cat([row, cross], dim=1), torch.cat([cross, row], dim=1)  # [S, 2, c]
        gram.baddbmm_(pair.mT, swapped, alpha=-1)
        roots[:, :, step] = row.squeeze(1)
    return gone, roots.gather(1, gone.unsqueeze(2).expand(-1, -1, steps))


def _remove(table: Tensor, channels: Tensor, outputs: int, gone: Tensor, root: Tensor) -> None:
    """Takes rows out of `table` ``[S, n, C + n]``: the others make up for them and move into the first n - b places."""
    steps, left = gone.shape[1], table.shape[1] - gone.shape[1]
    if not left:
        return
    change = torch.linalg.solve_triangular(root, _rows(table, gone), upper=False)  # [S, b, C + n]
    holes = gone.sort(dim=1).values
    last = torch.arange(left, left + steps, device=gone.device)
    taken = (last[:, None] == gone[:, None]).any(dim=2)  # [S, b]
    movers = last[taken.long().argsort(dim=1, stable=True)]  # those that stay come first, as many as holes before them
    channels.scatter_(1, holes, channels.gather(1, movers))
    table.scatter_(1, _expanded(holes, table), _rows(table, movers))
    for part in (table[:, :, outputs:], change[:, :, outputs:]):  # and columns
        source, target = (index.unsqueeze(1).expand(-1, part.shape[1], -1) for index in (movers, holes))
        part.scatter_(2, target, part.gather(2, source))
    change = change[:, :, : outputs + left]
    for own, step in zip(table[:, :left, : outputs + left], change, strict=True):
        own.addmm_(step[:, outputs:].T, step, alpha=-1)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``[S, b]`` of ``[S, n, k]``: ``[S, b, k]``."""
    return table.gather(1, _expanded(index, table))


def _expanded(index: Tensor, table: Tensor) -> Tensor:
    return index.unsqueeze(2).expand(-1, -1, table.shape[2])
