"""Plain attention of hierarchical families: the heads of a ViT, tokens as maps or in blocks of their own.

q, k and v are cut alike, as in a ViT. Small models have a `plain.SplitAttention` there, because timm's own classes have
one width for tokens and heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stratavit.elastic.attention import CoordinatesFirst, ElasticBiased
from stratavit.elastic.layers import RESHAPES, reshapes, unit_of


class ElasticWindow(ElasticBiased):
    """DaViT's `WindowAttention`: all windows of all images, without positions."""

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        for name in ("attn_drop", "proj_drop"):  # some of timm's classes have no dropout
            if not hasattr(self, name):
                self.add_module(name, nn.Dropout(0.0))

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """As of all attention; it returns as many and as wide tokens as it reads."""
        return super().refusal(stock) or (("qkv", RESHAPES) if reshapes(stock) else None)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B*windows, N, C]`` to the same."""
        return self._run(x, None)


class ElasticTokenMap(ElasticWindow):
    """`Attention` of VOLO and of SAM 2's Hiera: tokens are a map, and all of them see each other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, H, W, C]`` to the same."""
        return self._run(x.flatten(1, 2), None).unflatten(1, x.shape[1:3])


class ElasticBlocks(CoordinatesFirst, ElasticWindow):
    """NesT's `Attention`: tokens see those of their block of the image.

    Attributes:
        apart: Of two axes of tokens, the first holds blocks; see `plain.SplitAttention`.
    """

    apart = True

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, blocks, N, C]`` to the same."""
        return self._run(x.flatten(0, 1), None).unflatten(0, x.shape[:2])


class ElasticMaskUnits(ElasticWindow):
    """Hiera's `MaskUnitAttention`: tokens see all others, or those of their unit, which lie at equal distances."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, unit * units, C]`` to the same."""
        unit = unit_of(self)
        if not unit:
            return self._run(x, None)
        windows = x.unflatten(1, (unit, -1)).transpose(1, 2).flatten(0, 1)  # [B*units, unit, C]
        return self._run(windows, None).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)
