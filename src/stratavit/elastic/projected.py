"""``W L`` of one site, of which every width reads a prefix: kept on a CPU, where it is most of what a width costs."""

from __future__ import annotations

from types import NoneType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from stratavit.elastic.compensation import project
from stratavit.elastic.corrected import version_of


class Projected:
    """The first columns of a product, and a note of what it was computed from.

    It keeps none of what it was computed from alive. A copy of a network computes its own, and no file has one.

    Args:
        weight: The parameter that W is a view or copy of.
        factor: L, ``[n, n]``.
        matrix: W, ``[C, n]`` float32.
        columns: Of the product, ``[C, m]``.
    """

    def __init__(self, weight: Tensor, factor: Tensor, matrix: Tensor, columns: Tensor) -> None:
        self.columns = columns
        self._basis = ref(weight), ref(factor)
        self._then = _state(weight), _state(factor)
        self._mark = _mark(matrix)

    def __reduce__(self) -> tuple[Any, ...]:
        return NoneType, ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What it holds."""
        return self.columns, self._mark

    def fits(self, weight: Tensor, factor: Tensor, matrix: Tensor) -> bool:
        """Whether it was computed from these; changes through ``.data`` are found by a product with one vector."""
        same = self._basis[0]() is weight and self._basis[1]() is factor
        return same and self._then == (_state(weight), _state(factor)) and torch.equal(_mark(matrix), self._mark)


def extended(before: Projected | None, weight: Tensor, factor: Tensor, matrix: Tensor, keep: int) -> Projected:
    """The product of a weight at a width: the one before if it still fits and has these columns. No gradients.

    Args:
        before: What is kept, if anything.
        weight, factor, matrix: See `Projected`.
        keep: Columns that are needed.
    """
    with torch.inference_mode(False), torch.no_grad():
        if before is not None and not before.fits(weight, factor, matrix):
            before = None
        if before is not None and before.columns.shape[1] >= keep:
            return before
        columns = project(matrix, factor, keep, None if before is None else before.columns)
        return Projected(weight, factor, matrix, columns)


def can_be_kept(weight: Tensor) -> bool:
    """Whether a product is worth keeping: on a CPU, of a module's own weight, without gradient or trace."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    learns = torch.is_grad_enabled() and weight.requires_grad
    return weight.device.type == "cpu" and type(weight) is nn.Parameter and not traced and not learns


def _state(tensor: Tensor) -> tuple[int, torch.dtype, int]:
    return tensor.data_ptr(), tensor.dtype, version_of(tensor)


def _mark(matrix: Tensor) -> Tensor:
    """A sum of every row, no two columns alike, ``[C]``."""
    return matrix @ torch.arange(1.0, matrix.shape[1] + 1, device=matrix.device).cos()
