"""Plain attention of hierarchical families: the heads of a ViT, tokens as maps or in blocks of their own.

q, k and v are cut alike, as in a ViT. Small models have a `plain.SplitAttention` there, because timm's own classes have
one width for tokens and heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stratavit.elastic.attention import ElasticBiased


class ElasticWindow(ElasticBiased):
    """DaViT's `WindowAttention`: all windows of all images, without positions."""

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        for name in ("attn_drop", "proj_drop"):  # some of timm's classes have no dropout
            if not hasattr(self, name):
                self.add_module(name, nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B*windows, N, C]`` to the same."""
        return self._run(x, None)


class ElasticTokenMap(ElasticWindow):
    """VOLO's `Attention`: tokens are a map, and all of them see each other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, H, W, C]`` to the same."""
        return self._run(x.flatten(1, 2), None).unflatten(1, x.shape[1:3])


class ElasticBlocks(ElasticWindow):
    """NesT's `Attention`: tokens see those of their block of the image.

    Attributes:
        apart: Of two axes of tokens, the first holds blocks; see `plain.SplitAttention`.
    """

    apart = True

    def out_by_head(self) -> Tensor:
        """Of timm's module, `proj` reads coordinate after coordinate, each of all heads."""
        return self.proj.weight.unflatten(1, (self.full_width, self.heads)).transpose(1, 2)

    def whole_out(self) -> Tensor:
        """The same, head after head."""
        return self.out_by_head().flatten(1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens ``[B, blocks, N, C]`` to the same."""
        return self._run(x.flatten(0, 1), None).unflatten(0, x.shape[:2])
