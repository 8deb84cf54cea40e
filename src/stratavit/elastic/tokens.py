"""Blocks that merge tokens, in a super-network (the running call sets the number) and in its small models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from stratavit.elastic.merging import MergingBlock
from stratavit.elastic.running import current_run
from stratavit.elastic.token_places import TokenPlace


class ElasticMergingBlock(MergingBlock):
    """A block of a super-network: how many tokens it passes on is said by the call that runs."""

    def kept(self) -> int | None:
        """The number of the call that runs; None unless one is said."""
        return current_run().tokens.get(self)


def merging_blocks(model: nn.Module) -> dict[str, Any]:
    """Name -> block of those that can merge tokens."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MergingBlock)}


def token_counts(
    model: nn.Module, places: Iterable[TokenPlace], widths: Mapping[str, int]
) -> dict[nn.Module, int | None]:
    """Block of every place -> patch tokens that it passes on under a spec; None for all."""
    return {model.get_submodule(place.block): widths.get(place.name) for place in places}


def merge_at(model: nn.Module, blocks: Sequence[str], keep: Mapping[str, int], full: int, prefix: int) -> None:
    """Makes the blocks of a plain model merge tokens, in place; blocks before the first that does stay timm's own.

    Args:
        model: timm's, or a copy of a super-network's.
        blocks: Names of all blocks, in order of execution.
        keep: Block -> patch tokens that it passes on, of those that merge some.
        full: Patches of an image.
        prefix: Tokens in front that are never merged.
    """
    merging = False
    for name in blocks:
        block = model.get_submodule(name)
        block = block.as_stock() if isinstance(block, MergingBlock) else block
        merging = merging or name in keep
        if merging:
            block = MergingBlock(block, prefix, name == blocks[-1], keep.get(name), full)
        model.set_submodule(name, block)
