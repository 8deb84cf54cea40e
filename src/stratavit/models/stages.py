"""A model's forward pass, taken apart at its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stages:
    """A model's forward pass in three parts: ``tail(blocks(stem(images)))`` equals ``model(images)``.

    Attributes:
        stem: Images ``[B, 3, H, W]`` to tokens ``[B, N, C]`` (Swin: ``[B, H, W, C]``, everywhere).
        blocks: Name of every residual block (or step between blocks), and what it does to tokens.
        tail: Tokens to logits ``[B, classes]``.
        pool: Tokens to what the head reads, ``[B, C]``.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]
    tail: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]

    def answers(self, images: Tensor) -> Tensor:
        """All three parts: images ``[B, 3, H, W]`` to logits ``[B, classes]``."""
        return self.tail(self.through(self.stem(images)))

    def through(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens that enter block `first` to tokens that leave the last one."""
        for _, block in self.blocks[first:]:
            tokens = block(tokens)
        return tokens

    def block_of(self, site: str) -> int:
        """Number of the block that a site belongs to."""
        return next(i for i, (name, _) in enumerate(self.blocks) if site.startswith(name + "."))
