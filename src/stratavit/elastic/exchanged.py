"""What passes between attention and MLP modules that can be cut and those who convert and measure them.

Shape legend: B images, N tokens, C token width, H heads, d full head_dim, w kept width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from stratavit.elastic.delta import Weights
from stratavit.errors import StrataViTError, described

Compensation = Literal["none", "mean", "full"]


def known_compensation(name: Compensation) -> Compensation:
    """Returns the value; a `StrataViTError` if it is not one of the three."""
    if name not in ("none", "mean", "full"):
        raise StrataViTError(f"compensation: expected 'none', 'mean' or 'full', got {described(name)}")
    return name


class Observer(Protocol):
    """Sees the features of a module as it runs."""

    def features(self, features: Tensor) -> None:
        """Attention only: qkv ``[B, N, 3, H, w]`` (q before the attention scale), or v alone, ``[B, N, 1, H, w]``."""

    def pairs(self, products: Callable[[], Tensor]) -> None:
        """Rotary attention at full width: `rotary.pair_products` of the batch, ``[P, P]``, if they are of use."""

    def inputs_of_out(self, features: Tensor) -> None:
        """Attention: head outputs ``[B, N, H*w]``. MLP: post-activations ``[B, N, w]``."""

    def outputs(self, outputs: Tensor) -> None:
        """What the module adds to the residual stream, ``[B, N, C]``, before any LayerScale."""


@dataclass(frozen=True)
class AttentionTransform:
    """A change of coordinates inside the heads that leaves the attention module's function unchanged.

    Per head: ``W_q <- q W_q``, ``W_k <- k W_k``, ``W_v <- v W_v``, ``W_o <- W_o o`` (biases alike), with
    ``q^T k = 1`` and ``o v = 1``.

    Attributes:
        q, k: ``[H, d, d]``, new coordinates from old; None where q and k stay as they are.
        v: The same of v.
        o: ``[H, d, d]``, old coordinates from new.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    o: Tensor


def fold_heads(matrix: Tensor, weight: Tensor) -> Tensor:
    """Applies ``[H, d, d]`` to the rows of ``[H*d]`` or ``[H*d, C]`` head by head, in float64, cast back."""
    rows = weight.double().view(*matrix.shape[:2], -1)  # [H, d, C]
    return (matrix.to(rows.device) @ rows).view(weight.shape).to(weight.dtype)


class Probe(NamedTuple):
    """Stands in for a module's weights while the effect of small changes of its width is measured."""

    weights: Weights  # at some width p
    gate: Tensor | None  # attention: factor of each coordinate of q, [p]
