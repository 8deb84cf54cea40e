"""Blocks of small models whose attention or MLP has width 0: they run neither its norm nor an addition of zeros.

A constant that is left of an MLP becomes part of the bias that attention adds before it, or of attention's own
constant. One that is left of attention alone is added to the tokens as a vector: moved into the block before, it would
change what that block passes on, which users may read.

The parts keep their names and weights, unused norms included, so that files and state dicts are those of timm's blocks
with `Constant` in them. `torch.jit.script` compiles these blocks, hence the annotations that it knows.
"""

# ruff: noqa: UP045

from collections.abc import Iterable
from typing import Any, ClassVar, Optional

import torch
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stratavit.elastic.layers import ATTENTION
from stratavit.elastic.merging import MergingBlock, stock_class
from stratavit.elastic.plain import Constant


class ShortBlock(nn.Module):
    """A residual block of timm (attention, then MLP), one or both of which only add a constant.

    Args:
        block: The block; its parts are taken over.

    Attributes:
        attends: Its attention is more than a constant.
        feeds: Its MLP is.
    """

    __constants__: ClassVar[tuple[str, ...]] = ("attends", "feeds")
    stock: ClassVar[type[nn.Module]]

    def __init__(self, block: Any) -> None:
        super().__init__()
        vars(self).update(vars(block))
        self.attn: Any = block.attn
        self.mlp: Any = block.mlp
        self.norm1: nn.Module = block.norm1
        self.norm2: nn.Module = block.norm2
        self.drop_path1: nn.Module = block.drop_path1
        self.drop_path2: nn.Module = block.drop_path2
        self.attends, self.feeds = (not isinstance(part, Constant) for part in (block.attn, block.mlp))

    def scaled(self, x: Tensor, branch: int) -> Tensor:
        """What a branch adds, times its LayerScale if it has one."""
        gamma: Optional[Tensor] = self.gamma_1 if branch == 1 else self.gamma_2  # type: ignore[assignment]
        return x if gamma is None else gamma * x

    def factored(self, bias: Tensor, branch: int) -> Tensor:
        """The same of a constant ``[C]``, which no module gets: torch's counter of FLOPs expects no parameter."""
        return self.scaled(bias, branch)

    def after_attention(self, x: Tensor, added: Optional[Tensor]) -> Tensor:
        """Tokens ``[B, N, C]`` and what attention adds, None if it is gone, to what the block returns."""
        if self.attends:
            assert added is not None
            x = x + self.drop_path1(self.scaled(added, 1))
        elif self.training:  # whose drop path is per image
            x = x + self.drop_path1(self.scaled(self.attn(x), 1))
        elif self.attn.bias is not None:
            x = x + self.factored(self.attn.bias, 1)
        if self.feeds:
            x = x + self.drop_path2(self.scaled(self.mlp(self.norm2(x)), 2))
        elif self.training:
            x = x + self.drop_path2(self.scaled(self.mlp(x), 2))
        elif self.mlp.bias is not None:
            x = x + self.factored(self.mlp.bias, 2)
        return x


class ShortVit(ShortBlock):
    """The block of plain ViTs."""

    __constants__ = ("attends", "feeds", "has_factors")
    stock = Block

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.has_factors = is_scaled(block)
        self.ls1: Any = block.ls1
        self.ls2: Any = block.ls2

    def scaled(self, x: Tensor, branch: int) -> Tensor:
        """See `ShortBlock`."""
        scaled: Tensor = self.ls1(x) if branch == 1 else self.ls2(x)
        return scaled

    def factored(self, bias: Tensor, branch: int) -> Tensor:
        """See `ShortBlock`."""
        if self.has_factors:
            factors: Tensor = self.ls1.gamma if branch == 1 else self.ls2.gamma
            return bias * factors
        return bias

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to the same; the other arguments are those of attention."""
        added: Optional[Tensor] = None
        if self.attends:
            added = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return self.after_attention(x, added)


class ShortEva(ShortBlock):
    """The block of EVA and DINOv3, with rotary positions."""

    stock = EvaBlock

    def forward(
        self, x: Tensor, rope: Optional[Tensor] = None, attn_mask: Optional[Tensor] = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens ``[B, N, C]`` to the same; the other arguments are those of attention."""
        added: Optional[Tensor] = None
        if self.attends:
            if is_causal:
                raise NotImplementedError("a causal mask of a model that was cut: pass it as attn_mask")
            added = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask)
        return self.after_attention(x, added)


class ShortBeit(ShortBlock):
    """The block of BEiT."""

    stock = BeitBlock

    def forward(self, x: Tensor, shared_rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """Tokens ``[B, N, C]`` to the same; the other argument is attention's."""
        added: Optional[Tensor] = None
        if self.attends:
            added = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        return self.after_attention(x, added)


SHORT: dict[type[nn.Module], type[ShortBlock]] = {kind.stock: kind for kind in (ShortVit, ShortEva, ShortBeit)}


def can_be_short(block: nn.Module) -> bool:
    """Whether a block, also one that merges tokens, is of a class whose constants can be left out."""
    return stock_class(block) in SHORT


def shorten(model: nn.Module, blocks: Iterable[str]) -> None:
    """Puts short blocks in the place of those in which attention or MLP is a `Constant`, where their class is known."""
    for name in blocks:
        block: Any = model.get_submodule(name)
        if not can_be_short(block) or isinstance(block, MergingBlock):
            continue
        if isinstance(block.attn, Constant) or isinstance(block.mlp, Constant):
            model.set_submodule(name, SHORT[stock_class(block)](block))


def is_scaled(block: Any) -> bool:
    """Whether what a block's attention or MLP adds has a factor (LayerScale)."""
    scales = (getattr(block, f"ls{branch}", None) for branch in (1, 2))
    factors = (getattr(block, f"gamma_{branch}", None) for branch in (1, 2))
    return not all(isinstance(scale, nn.Identity | None) for scale in scales) or any(x is not None for x in factors)


def folds_into(attn: Any) -> bool:
    """Whether the attention of a small model has a bias at its end."""
    if isinstance(attn, Constant):
        return attn.bias is not None
    return isinstance(attn, ATTENTION) and attn.proj.bias is not None


@torch.no_grad()
def fold_constants(model: nn.Module, blocks: Iterable[str]) -> None:
    """Adds what an MLP of width 0 adds to the bias of attention before it, where both are there and nothing scales."""
    for name in blocks:
        block: Any = model.get_submodule(name)
        if not can_be_short(block) or is_scaled(block):
            continue
        if not isinstance(block.mlp, Constant) or block.mlp.bias is None:
            continue
        if folds_into(block.attn):
            goal: Any = block.attn if isinstance(block.attn, Constant) else block.attn.proj
            goal.bias.add_(block.mlp.bias)
            block.mlp.bias = None
