"""The mean of what the head reads, put back: the last thing by which the outputs of a small model are shifted.

What errors of all blocks do to the *mean* of the final feature is a constant per size. It is measured at a
few sizes, interpolated in the share of MACs, and added to the bias of the last norm: free at run time.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.running import current_run


@dataclass(frozen=True)
class FinalMean:
    """Mean shift at a few sizes.

    Attributes:
        shares: Shares of the dense MACs, descending, below 1.
        vectors: Dense minus small mean of what the head reads, ``[sizes, C]``.
    """

    shares: tuple[float, ...]
    vectors: Tensor

    def at(self, share: float) -> Tensor:
        """The shift at a share of the MACs: linear between sizes, nothing at the full one, constant below the last."""
        knots = [1.0, *self.shares]
        vectors = torch.cat([torch.zeros_like(self.vectors[:1]), self.vectors])
        low = bisect_right([-knot for knot in knots], -share)  # first knot below the share
        if low in (0, len(knots)):
            return vectors[max(low - 1, 0)]
        part = (knots[low - 1] - share) / (knots[low - 1] - knots[low])
        return vectors[low - 1] * (1 - part) + vectors[low] * part

    def to(self, device: torch.device) -> FinalMean:
        """The same on another device."""
        with torch.inference_mode(False):  # it may serve passes with gradients later
            return replace(self, vectors=self.vectors.to(device))


class Shift:
    """Forward hook of the last norm: adds the shift of the current run to its output, if there is one."""

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output of the norm, shifted."""
        value = current_run().shifts.get(self)
        return output if value is None else output + value.to(output)
