"""Exact means and covariances over a data set, batch by batch, in memory that does not grow.

Shape legend: G groups (heads), T tokens, d coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLUSH = 256  # batches that are added up in their own precision
SMALL, BLOCKS = 256, 8  # channels below which a product is made whole; else block rows, of half so many at least


def wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has no float64."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


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
        new = [wide(part) for part in parts]
        self.totals = [a.add_(b) for a, b in zip(self.totals, new, strict=True)] if self.totals else new
        self.count += count

    @property
    def means(self) -> list[Tensor]:
        """The sums over the number of tokens."""
        return [total / self.count for total in self.totals]


class RunningScatter:
    """Weighted scatter ``sum_t w_t (x_t - mean)(x_t - mean)^T`` around the *unweighted* mean of all tokens.

    Products are computed per batch in the batch's own precision and added up in float64. Tokens are shifted by the mean
    of the first batch beforehand, so that no precision is lost to a large mean; the shift cancels in the result.

    Attributes:
        sums: So far, of the shifted tokens.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self._shift: Tensor | None = None  # [G, 1, d]

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds tokens ``[G, T, d]`` with weights ``[G, T]`` >= 0; all 1 if None."""
        if self._shift is None:
            self._shift = x.mean(dim=1, keepdim=True)
        x = x - self._shift
        weight = x.new_ones(x.shape[:2]) if weight is None else weight
        weighted = x * weight.unsqueeze(-1)  # [G, T, d]
        self.sums.add(x.shape[1], x.sum(dim=1), weight.sum(dim=1), weighted.sum(dim=1), x.transpose(1, 2) @ weighted)

    @property
    def scatter(self) -> Tensor:
        """The scatter of all tokens, ``[G, d, d]`` float64, symmetric."""
        plain, total, first, second = self.sums.totals
        mean = plain / self.sums.count  # of the shifted tokens
        cross = first.unsqueeze(-1) * mean.unsqueeze(-2)  # sum_t w_t x_t mean^T
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        scatter = second - cross - cross.transpose(1, 2) + total[:, None, None] * outer
        return (scatter + scatter.transpose(1, 2)) / 2


def _elsewhere(x: Tensor) -> bool:
    """Whether it is not on the CPU."""
    return x.device.type != "cpu"


def _block_rows(n: int) -> list[tuple[int, int]]:
    size = n if n < SMALL else max(SMALL // 2, -(-n // BLOCKS))
    return [(start, min(start + size, n)) for start in range(0, n, size)]


class GramSum:
    """``sum_t x_t x_t^T`` over tokens, as the block rows of its lower triangle; what lies above is its mirror image.

    Products are added up in the batches' own precision, and moved to float64 every `FLUSH` batches. In float32 an entry
    is off by at most about ``(T + FLUSH) 2^-24`` times ``sum_t |x_ti x_tj|``, T the tokens of the largest batch.

    Args:
        n: Number of channels.
        flat: Zeros, of `size(n)` numbers, in which the sum is kept.
        streamed: The product of a batch is made where its tokens are, and then added where `flat` is.
    """

    def __init__(self, n: int, flat: Tensor, streamed: bool = False) -> None:
        self.ends = _block_rows(n)
        self._flat, self._streamed = flat, streamed
        self._wide: list[Tensor] = []
        self._added = 0

    @staticmethod
    def size(n: int) -> int:
        """How many numbers the block rows of ``[n, n]`` have."""
        return sum((stop - start) * stop for start, stop in _block_rows(n))

    def add(self, x: Tensor) -> None:
        """Adds tokens ``[T, n]``."""
        if self._added == FLUSH:
            self._flush()
        product = x.new_zeros(self._flat.shape) if self._streamed else self._flat
        for (start, stop), row in zip(self.ends, self._rows_of(product), strict=True):
            row.addmm_(x[:, start:stop].T, x[:, :stop])
        if self._streamed:
            self._flat += product.to(self._flat.device)
        self._added += 1

    def _rows_of(self, flat: Tensor) -> list[Tensor]:
        """The block rows, views of all their numbers."""
        parts = flat.split([(stop - start) * stop for start, stop in self.ends])
        return [part.view(-1, stop) for part, (_, stop) in zip(parts, self.ends, strict=True)]

    def _flush(self) -> None:
        rows = [wide(row) for row in self._rows_of(self._flat)]
        self._wide = [a.add_(b) for a, b in zip(self._wide, rows, strict=True)] if self._wide else rows
        self._flat, self._added = torch.zeros_like(self._flat), 0

    @property
    def _sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """Block rows of what was added since the last flush, and of what was added before."""
        return self._rows_of(self._flat), self._wide

    def add_to(self, total: Tensor, factor: Tensor) -> None:
        """Adds `factor` times the sum to `total` ``[n, n]``, its lower block triangle only."""
        for part in self._sums:
            for (start, stop), row in zip(self.ends, part, strict=False):
                total[start:stop, :stop].addcmul_(row.to(total), factor)

    def mirror(self, total: Tensor) -> None:
        """Copies the lower block triangle of ``[n, n]`` to the upper one."""
        for start, stop in self.ends:
            total[:start, start:stop] = total[start:stop, :start].T

    def inner(self, other: Tensor) -> Tensor:
        """Sum, in float64, of the products of all its entries with those of a symmetric ``[n, n]``."""
        total = other.new_zeros((), dtype=torch.float64)
        for part in self._sums:
            for (start, stop), row in zip(self.ends, part, strict=False):
                products = row.to(other) * other[start:stop, :stop]
                total += 2 * products.sum(dtype=total.dtype) - products[:, start:].sum(dtype=total.dtype)
        return total

    def is_finite(self) -> Tensor:
        """Whether all of it is, one boolean on the device."""
        return torch.stack([row.isfinite().all() for part in self._sums for row in part]).all()


class RunningCovariance:
    """Mean and covariance of weighted vectors. Sums are kept for two folds of the data: either can be had alone.

    Args:
        host: The sums of products are kept on the CPU, wherever the tokens are.
    """

    def __init__(self, host: bool = False) -> None:
        self.host = host
        self._shift: Tensor | None = None  # [n]
        self._sums: dict[int, tuple[Sums, GramSum]] = {}  # fold -> of w and w x; of w x x^T

    def update(self, x: Tensor, weight: Tensor | None = None, fold: int = 0) -> None:
        """Adds tokens ``[T, n]`` with weights ``[T]`` >= 0, all 1 if None, to a fold."""
        if self._shift is None:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        if fold not in self._sums:
            n, streamed = x.shape[1], self.host and _elsewhere(x)
            zeros = x.new_zeros(GramSum.size(n), device="cpu" if self.host else None)
            self._sums[fold] = Sums(), GramSum(n, zeros, streamed)
        sums, products = self._sums[fold]
        if weight is None:
            sums.add(len(x), x.new_full((), len(x)), x.sum(dim=0))
        else:
            sums.add(len(x), weight.sum(), weight @ x)
            x *= weight.sqrt().unsqueeze(1)
        products.add(x)

    def result(self, folds: tuple[int, ...] = (0, 1)) -> tuple[Tensor, Tensor]:
        """Mean ``[n]`` float64, covariance ``[n, n]`` as precise as the tokens; of all data if the folds are empty."""
        assert self._shift is not None, "no batch was seen"
        chosen = [self._sums[fold] for fold in folds if fold in self._sums] or list(self._sums.values())
        factor = 1 / torch.stack([sums.totals[0] for sums, _ in chosen]).sum()  # on the device, where nobody looks
        first = torch.zeros_like(wide(self._shift))
        second = torch.zeros(len(first), len(first), dtype=self._shift.dtype, device=first.device)
        for sums, products in chosen:
            first += factor * sums.totals[1]
            products.add_to(second, factor.to(second))
        products.mirror(second)
        mean = first.to(second)
        return wide(self._shift) + first, second.addr_(mean, mean, alpha=-1)

    def is_finite(self) -> Tensor:
        """Whether all sums are, one boolean on the device."""
        first = [total.isfinite().all() for sums, _ in self._sums.values() for total in sums.totals]
        second = [products.is_finite() for _, products in self._sums.values()]
        return torch.stack([*first, *(one.to(first[0].device) for one in second)]).all()
