"""What a cut loses and the kept channels can still say: closed-form regression, folded into the next linear map.

A module reads channels x (mean mu, covariance S) through a linear map W. Of the dropped channels d the
kept ones k predict ``mu_d + B (x_k - mu_k)`` with ``B = S_dk (S_kk + ridge I)^-1``, so that
``W_k + W_d B`` and a bias do the work of W. With the Cholesky factor ``S + ridge I = L L^T`` and the
channels sorted, every cut is a prefix and one factor serves all of them: ``B = L_dk L_kk^-1``, hence
``W_k + W_d B = (W L)_k L_kk^-1``, one triangular solve.

Pure functions on tensors; no images are needed at this point. Shape legend: C outputs, n channels, k kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean eigenvalue; figures are flat from 1e-4 to 1e-2
LARGEST_RATIO = 16.0  # of energies that is made up for; kept channels that say nothing must not be blown up
PACKED_ROWS = 8  # block rows of a packed factor
GAIN = 0.5  # share of the lost output energy (in the logarithm) that is put back
COLUMNS = 192  # of a product at once; on a CPU, 96 to 384 are equally fast


@dataclass(frozen=True)
class Moments:
    """What compensation needs to know about the channels of one site.

    Attributes:
        factor: Lower Cholesky factor of ``S + ridge I``, ``[n, n]`` float32.
        ridge: What was added to the diagonal of S.
        energy: ``tr(W S W^T)``, the variance of the full map's output (before any LayerScale).
    """

    factor: Tensor
    ridge: float
    energy: float

    @property
    def nbytes(self) -> int:
        """Bytes of the factor."""
        return self.factor.nbytes

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        return replace(self, factor=self.factor.to(device))

    def packed(self) -> PackedMoments:
        """The same in little more than half of the bytes."""
        n = len(self.factor)
        rows = [self.factor[start:stop, :stop].flatten() for start, stop in _block_rows(n)]
        return PackedMoments(torch.cat(rows), n, self.ridge, self.energy)


@dataclass(frozen=True)
class PackedMoments:
    """Moments that wait: of the factor the block rows of the lower triangle alone.

    Attributes:
        flat: The block rows, one after the other, float32.
        n, ridge, energy: Number of channels, and as in `Moments`.
    """

    flat: Tensor
    n: int
    ridge: float
    energy: float

    @property
    def nbytes(self) -> int:
        """Bytes of the factor."""
        return self.flat.nbytes

    @staticmethod
    def size(n: int) -> int:
        """How many numbers of ``[n, n]`` are kept."""
        return sum((stop - start) * stop for start, stop in _block_rows(n))

    def to(self, device: torch.device) -> Moments:
        """The same on a device, ready for use."""
        factor, flat, first = torch.zeros(self.n, self.n, device=device), self.flat.to(device), 0
        for start, stop in _block_rows(self.n):
            last = first + (stop - start) * stop
            factor[start:stop, :stop], first = flat[first:last].view(stop - start, stop), last
        return Moments(factor, self.ridge, self.energy)


def _block_rows(n: int) -> Iterable[tuple[int, int]]:
    return pairwise(n * part // PACKED_ROWS for part in range(PACKED_ROWS + 1))


class Attempt(NamedTuple):
    """A Cholesky factor whose existence nobody has looked at, so that nothing has waited for a device.

    Attributes:
        factor: Lower factor of ``S + r I``, ``[n, n]``, as precise as S; of no use where it failed.
        added: r, a float64 on the device.
        failed: Not 0 where there is no factor, on the device.
    """

    factor: Tensor
    added: Tensor
    failed: Tensor


def attempt(covariance: Tensor, added: Tensor | None = None, ridge: float = RIDGE) -> Attempt:
    """One attempt of `cholesky`, with r: `ridge` times the mean eigenvalue of S ``[n, n]`` if it is not given."""
    diagonal, before = covariance.diagonal(), covariance.diagonal().clone()
    if added is None:
        added = (ridge * before.mean(dtype=torch.float64)).clamp_min(torch.finfo(torch.float32).tiny)
    diagonal.add_(added)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal.copy_(before)  # a copy of the matrix would be the largest part of what contraction holds
    return Attempt(factor, added, failed)


def cholesky(covariance: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """Lower factor ``[n, n]`` of ``S + r I``, and r: `ridge` times the mean eigenvalue of S ``[n, n]``.

    It is made in the precision of S, and once more in float64 where that fails. Rounding can leave S with eigenvalues a
    little below 0, and constant channels with none above: r then grows tenfold until the factor exists.
    """
    found = attempt(covariance, ridge=ridge)
    if found.failed:
        covariance = covariance.double()
        found = attempt(covariance, found.added)
    while found.failed:
        assert found.added < float("inf"), "the covariance is not finite"
        found = attempt(covariance, found.added * 10)
    return found.factor, float(found.added)


def rows_of(factor: Tensor) -> Tensor:
    """A factor ``[n, n]`` in float32, row by row as it is read from a file: the layout decides how products round."""
    return factor.float().contiguous()


def factorise(covariance: Tensor, energy: float, ridge: float = RIDGE) -> Moments:
    """Moments of channels with a covariance ``[n, n]``; `energy` is the variance of what their map makes of them."""
    factor, added = cholesky(covariance, ridge)
    return Moments(rows_of(factor), added, max(energy, 0.0))  # rounding can leave a little below


def project(weight: Tensor, factor: Tensor, keep: int, known: Tensor | None = None) -> Tensor:
    """First columns of ``W L``, at least `keep`, of W ``[C, n]`` and lower triangular L ``[n, n]``; ``[C, >= keep]``.

    Columns come in groups, and most zeros of L are left out. On a CPU the groups begin where they begin at any `keep`,
    so that a column is the same, bit by bit, whether it was computed now or before.

    Args:
        weight, factor: W and L.
        keep: 0 < keep <= n.
        known: Columns that a call with a smaller `keep` returned, on a CPU; only those that follow are computed.
    """
    n, first = len(factor), 0 if known is None else known.shape[1]
    # elsewhere a product more costs more than what it leaves out
    group, end = (COLUMNS, n) if weight.device.type == "cpu" else (max(512, -(-keep // 4)), keep)
    found = [] if known is None else [known]
    for start in range(first, keep, group):
        stop = min(start + group, end)
        found.append(weight[:, start:] @ factor[start:, start:stop])
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class System(NamedTuple):
    """``X A = B``, which is solved for X: the map of the kept channels that predicts what all channels did.

    Attributes:
        factor: A, lower triangular, ``[k, k]``.
        projected: B, the first columns of the product of map and factor, ``[C, k]``.
    """

    factor: Tensor
    projected: Tensor


def system_of(weight: Tensor, moments: Moments, keep: int, projected: Tensor | None = None) -> System:
    """What is to be solved for a cut, see `compensate` for the arguments."""
    projected = project(weight, moments.factor, keep) if projected is None else projected
    # whole rows: the solver copies anything else, column by column
    return System(moments.factor[:keep, :keep], projected[:, :keep].contiguous())


def solve(system: System) -> Tensor:
    """The solution of a system, ``[C, k]``."""
    return torch.linalg.solve_triangular(system.factor.contiguous(), system.projected, upper=False, left=False)


def solved_alone(system: System) -> tuple[System, Tensor]:
    """A system with its solution, ``[C, k]``.

    The copy of the factor lives as long as both: its memory would be given back, and asked for again by what follows.
    """
    whole = System(system.factor.contiguous(), system.projected)
    return whole, solve(whole)


def solve_together(systems: Sequence[System]) -> Tensor:
    """The solutions of S systems of one shape from one call, ``[S, C, k]``."""
    factors, projected = (torch.stack(parts) for parts in zip(*systems, strict=True))
    return torch.linalg.solve_triangular(factors, projected, upper=False, left=False)


def compensate(
    weight: Tensor, mean: Tensor, moments: Moments, keep: int, gain: float = GAIN, projected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The map that stands in for `weight` when only the first `keep` channels are left.

    Args:
        weight: ``[C, n]`` float32, channels sorted. Gradients flow through it, except through what dropped
            channels add to the bias.
        mean: Mean of the channels, ``[n]``.
        moments: Of the channels.
        keep: 0 < keep <= n.
        gain: The result is scaled by ``(energy of W / energy of the result) ** (gain / 2)``: regression
            shrinks, and later blocks are used to the full variance. 0 leaves the plain regression.
        projected: `project` of `weight` at this width or a larger one, where widths share it.

    Returns:
        The map ``[C, keep]`` and what is added to the bias ``[C]``, so that the mean output stays.
    """
    system = system_of(weight, moments, keep, projected)
    return completed(weight, mean, moments, system, solve(system), gain)


def completed(
    weight: Tensor, mean: Tensor, moments: Moments, system: System, kept: Tensor, gain: float = GAIN
) -> tuple[Tensor, Tensor]:
    """`compensate` from the solution `kept` ``[C, k]`` of its system, which may be changed in place."""
    keep = kept.shape[1]
    if gain:  # in tensors, not numbers: nothing waits for a GPU, and a compiler sees through
        energy = system.projected.detach().square().sum() - moments.ridge * kept.detach().square().sum()
        wide = torch.float32 if energy.device.type == "mps" else torch.float64  # it has no other
        lost = (moments.energy / energy.to(wide)).clamp(max=LARGEST_RATIO)
        lost = torch.where((energy > 0) & (lost > 1), lost, 1.0)
        kept = _scaled(kept, (lost ** (gain / 2)).to(kept.dtype))
    constant = weight[:, :keep] @ mean[:keep] + weight[:, keep:].detach() @ mean[keep:]
    return kept, constant - kept @ mean[:keep]


def _scaled(kept: Tensor, factor: Tensor) -> Tensor:
    """``kept * factor``; in place where no gradient needs what was there."""
    return kept * factor if torch.is_grad_enabled() else kept.mul_(factor)
