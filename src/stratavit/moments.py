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
