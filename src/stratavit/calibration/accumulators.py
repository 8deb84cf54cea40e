"""Exact means and covariances over a data set, batch by batch, in memory that does not grow.

Shape legend: G groups (heads), T tokens, d coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sums:
    """Sums over tokens, in float64; on the CPU where the device has no float64.

    Attributes:
        count: Tokens so far.
        totals: The sums so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []

    def add(self, count: int, *parts: Tensor) -> None:
        """Adds sums over `count` more tokens, of the same shapes each time; float64 ones may be kept and changed."""
        wide = [part.to("cpu" if part.device.type == "mps" else part.device, torch.float64) for part in parts]
        self.totals = [a.add_(b) for a, b in zip(self.totals, wide, strict=True)] if self.totals else wide
        self.count += count

    @property
    def means(self) -> list[Tensor]:
        """The sums over the number of tokens."""
        return [total / self.count for total in self.totals]


class RunningScatter:
    """Weighted scatter ``sum_t w_t (x_t - mean)(x_t - mean)^T`` around the *unweighted* mean of all tokens.

    Products are computed per batch in the batch's own precision and added up in float64. Tokens are shifted by the mean
    of the first batch beforehand, so that no precision is lost to a large mean; the shift cancels in the result.
    """

    def __init__(self) -> None:
        self._sums = Sums()
        self._shift: Tensor | None = None  # [G, 1, d]

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds tokens ``[G, T, d]`` with weights ``[G, T]`` >= 0; all 1 if None."""
        if self._shift is None:
            self._shift = x.mean(dim=1, keepdim=True)
        x = x - self._shift
        weight = x.new_ones(x.shape[:2]) if weight is None else weight
        weighted = x * weight.unsqueeze(-1)  # [G, T, d]
        self._sums.add(x.shape[1], x.sum(dim=1), weight.sum(dim=1), weighted.sum(dim=1), x.transpose(1, 2) @ weighted)

    @property
    def scatter(self) -> Tensor:
        """The scatter of all tokens, ``[G, d, d]`` float64, symmetric."""
        plain, total, first, second = self._sums.totals
        mean = plain / self._sums.count  # of the shifted tokens
        cross = first.unsqueeze(-1) * mean.unsqueeze(-2)  # sum_t w_t x_t mean^T
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        scatter = second - cross - cross.transpose(1, 2) + total[:, None, None] * outer
        return (scatter + scatter.transpose(1, 2)) / 2


class RunningCovariance:
    """Mean and covariance of vectors under a mixture of two token weights.

    A token's weight is ``(1 - share) + share * w / mean(w)``: part plain, part in proportion to how much the output
    reacts to that token. ``mean(w)`` is known at the end only, hence two sums. They are kept for two folds of the data,
    so that the moments of one fold can be had alone.

    Args:
        share: Share of the weighted part, 0 to 1; at 0 no weights are needed.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._shift: Tensor | None = None  # [n]
        self._sums: dict[tuple[int, bool], Sums] = {}  # (fold, weighted) -> sums of w, w x, w x x^T

    def update(self, x: Tensor, weight: Tensor | None = None, fold: int = 0) -> None:
        """Adds tokens ``[T, n]`` with weights ``[T]`` >= 0 to a fold."""
        if self._shift is None:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        plain = self._sums.setdefault((fold, False), Sums())
        plain.add(len(x), x.new_tensor(len(x)), x.sum(dim=0), gram(x))
        if self.share > 0:
            assert weight is not None
            root = x * weight.sqrt().unsqueeze(1)
            weighted = self._sums.setdefault((fold, True), Sums())
            weighted.add(len(x), weight.sum(), (x * weight.unsqueeze(1)).sum(dim=0), gram(root))

    def result(self, folds: tuple[int, ...] = (0, 1)) -> tuple[Tensor, Tensor]:
        """Mean ``[n]`` and covariance ``[n, n]``, float64; of all data if the folds are empty.

        Tokens that all weigh nothing count as plain ones.
        """
        assert self._shift is not None, "no batch was seen"
        if not any(fold in folds for fold, _ in self._sums):
            folds = (0, 1)
        first, second = (torch.zeros_like(total) for total in next(iter(self._sums.values())).totals[1:])
        for weighted, share in ((False, 1 - self.share), (True, self.share)):
            if share > 0:
                parts = self._parts(folds, weighted) or self._parts(folds, False)
                total = torch.stack([part[0] for part in parts]).sum()
                for _, sum_x, sum_xx in parts:
                    first += share * sum_x / total
                    second += share * sum_xx / total
        return self._shift.to(first) + first, second - torch.outer(first, first)

    def _parts(self, folds: tuple[int, ...], weighted: bool) -> list[list[Tensor]]:
        """The sums of folds; none if nothing in them weighs anything."""
        found = [self._sums[fold, weighted].totals for fold in folds if (fold, weighted) in self._sums]
        return found if any(part[0] > 0 for part in found) else []


def gram(x: Tensor) -> Tensor:
    """``x^T x`` of ``[T, n]``; of 4 x 4 blocks those above the diagonal are mirrored: 3/8 of the products saved."""
    n = x.shape[1]
    if n < 256:
        return x.T @ x
    result, size = x.new_empty(n, n), -(-n // 4)
    for start in range(0, n, size):
        stop = min(start + size, n)
        part = x[:, start:stop].T @ x[:, :stop]  # [stop - start, stop]
        result[start:stop, :stop] = part
        result[:start, start:stop] = part[:, :start].T
    return result
