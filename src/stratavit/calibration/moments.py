"""Streaming moments: exact means and covariances over a whole data set, in memory that does not grow.

Pure functions on tensors. Shape legend: G groups (heads), T tokens, d coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """To float64, on the CPU where the device has no float64."""
    return x.to(device="cpu" if x.device.type == "mps" else x.device, dtype=torch.float64)


class RunningMean:
    """Mean over tokens of vectors ``[G, d]``, summed in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, batch_sum: Tensor, count: int) -> None:
        """Adds a batch's sum over its `count` tokens, ``[G, d]``."""
        wide = _wide(batch_sum)
        self._sum = wide if self._sum is None else self._sum + wide
        self.count += count

    @property
    def mean(self) -> Tensor:
        """The mean so far, ``[G, d]`` float64."""
        assert self._sum is not None, "no batch was seen"
        return self._sum / self.count


class RunningScatter:
    """Weighted scatter ``sum_t w_t (x_t - mean)(x_t - mean)^T`` around the *unweighted* mean of all tokens.

    Products are taken per batch in the batch's own precision and added up in float64. Tokens are
    shifted by the mean of the first batch beforehand, so that no precision is lost to a large mean;
    the shift cancels exactly in the result.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None  # [G, 1, d]
        self._parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            x: Features ``[G, T, d]``.
            weight: Importance of each token, ``[G, T]``, >= 0; all 1 if None.
        """
        if self._shift is None:
            self._shift = x.mean(dim=1, keepdim=True)
        x = x - self._shift
        weight = x.new_ones(x.shape[:2]) if weight is None else weight
        weighted = x * weight.unsqueeze(-1)  # [G, T, d]
        parts = (
            _wide(x.sum(dim=1)),  # [G, d]
            _wide(weight.sum(dim=1)),  # [G]
            _wide(weighted.sum(dim=1)),  # [G, d]
            _wide(x.transpose(1, 2) @ weighted),  # [G, d, d]
        )
        self._parts = parts if self._parts is None else tuple(a + b for a, b in zip(self._parts, parts, strict=True))  # type: ignore[assignment]
        self.count += x.shape[1]

    @property
    def mean(self) -> Tensor:
        """Unweighted mean, ``[G, d]`` float64."""
        assert self._parts is not None, "no batch was seen"
        assert self._shift is not None
        return _wide(self._shift.squeeze(1)) + self._parts[0] / self.count

    @property
    def scatter(self) -> Tensor:
        """Weighted scatter around the unweighted mean, ``[G, d, d]`` float64, symmetric."""
        assert self._parts is not None, "no batch was seen"
        plain, total, first, second = self._parts
        mean = plain / self.count  # of the shifted tokens
        cross = first.unsqueeze(-1) * mean.unsqueeze(-2)  # sum_t w_t x_t mean^T
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        scatter = second - cross - cross.transpose(1, 2) + total[:, None, None] * outer
        return (scatter + scatter.transpose(1, 2)) / 2


class RunningCovariance:
    """Mean and covariance of vectors under a mixture of two token weights, both sums over the whole set.

    A token's weight is ``(1 - share) + share * w / mean(w)``: part plain, part in proportion to how much
    the output reacts to that token. ``mean(w)`` is known at the end only, hence two accumulators. They are kept for two
    folds of the data, so that the moments of one fold can be had alone.

    Args:
        share: Share of the weighted part, 0 to 1; at 0 no weights are needed.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._shift: Tensor | None = None  # [n]
        self._parts: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}  # sums of w, w x, w x x^T

    def update(self, x: Tensor, weight: Tensor | None = None, fold: int = 0) -> None:
        """Adds tokens ``[T, n]`` with weights ``[T]`` >= 0 to a fold."""
        if self._shift is None:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        self._add((fold, False), x.new_ones(len(x)), x, x)
        if self.share > 0:
            assert weight is not None
            self._add((fold, True), weight, x * weight.unsqueeze(1), x * weight.sqrt().unsqueeze(1))

    def _add(self, key: tuple[int, bool], weight: Tensor, first: Tensor, root: Tensor) -> None:
        """`first` is ``w x``, `root` is ``sqrt(w) x``, both ``[T, n]``."""
        parts = (_wide(weight.sum()), _wide(first.sum(dim=0)), _wide(gram(root)))
        if key not in self._parts:
            self._parts[key] = parts
        else:
            for total, part in zip(self._parts[key], parts, strict=True):
                total.add_(part)

    def result(self, folds: tuple[int, ...] = (0, 1)) -> tuple[Tensor, Tensor]:
        """Mean ``[n]`` and covariance ``[n, n]``, float64; of all data if the folds are empty.

        Tokens that all weigh nothing count as plain ones.
        """
        assert self._shift is not None, "no batch was seen"
        if not any(fold in folds for fold, _ in self._parts):
            folds = (0, 1)
        n = len(self._shift)
        first, second = _wide(self._shift.new_zeros(n)), _wide(self._shift.new_zeros(n, n))
        for weighted, share in ((False, 1 - self.share), (True, self.share)):
            parts = self._of(folds, weighted)
            if share > 0:
                total = torch.stack([part[0] for part in parts]).sum()
                for part in parts:
                    first += share * part[1] / total
                    second += share * part[2] / total
        return _wide(self._shift) + first, second - torch.outer(first, first)

    def _of(self, folds: tuple[int, ...], weighted: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = [self._parts[fold, weighted] for fold in folds if (fold, weighted) in self._parts]
        return found if any(part[0] > 0 for part in found) else self._of(folds, False)


def gram(x: Tensor, blocks: int = 4) -> Tensor:
    """``x^T x`` of ``[T, n]``: the blocks above the diagonal are mirrored, which saves 3/8 of the products."""
    n = x.shape[1]
    if n < 64 * blocks:
        return x.T @ x
    result = x.new_empty(n, n)
    size = -(-n // blocks)
    for start in range(0, n, size):
        stop = min(start + size, n)
        part = x[:, start:stop].T @ x[:, :stop]  # [stop - start, stop]
        result[start:stop, :stop] = part
        result[:start, start:stop] = part[:, :start].T
    return result
