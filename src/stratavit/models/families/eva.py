"""timm's `Eva` (EVA, EVA-02, DINOv3, PE and other models with rotary positions) and `Beit` (BEiT, BEiT-v2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from stratavit.elastic.merging import stock_class
from stratavit.models.families.base import Family, Stages, head_stages, heads_of, sizes


class BeitFamily(Family):
    """ViTs with relative positions."""

    title = "BEiT"
    model = Beit
    fallback = "beit_base_patch16_224"

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its attention has a bias for every pair of patches (relative positions)"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; a bias that all blocks share comes from the stem that ran last."""
        shared: list[Tensor | None] = [None]

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.patch_embed(images)
            tokens = torch.cat((model.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
            shared[0] = None if model.rel_pos_bias is None else model.rel_pos_bias()
            positioned: Tensor = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
            return positioned

        def run(block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, shared_rel_pos_bias=shared[0])

        return head_stages(model, stem, [(name, partial(run, block)) for name, block in self.blocks(model)])

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        heads = heads_of(model.blocks)
        return sizes(model) | {"depth": len(model.blocks)} | ({"num_heads": heads} if heads else {})


class EvaFamily(BeitFamily):
    """ViTs with rotary positions."""

    title = "EVA"
    model = Eva
    fallback = "eva02_tiny_patch14_224"

    def merging(self, model: Any) -> int | str:
        """A merged token keeps the position of the one that others joined."""
        if any(stock_class(block) is not EvaBlock for block in model.blocks):
            return "its blocks normalise after attention"
        return int(model.num_prefix_tokens)

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; sines and cosines come from the stem that ran last."""
        ropes: list[Tensor | None] = [None] * len(model.blocks)

        def stem(images: Tensor) -> Tensor:
            tokens, rope = model._pos_embed(model.patch_embed(images))
            mixed = getattr(model, "rope_mixed", False) and rope is not None
            ropes[:] = list(rope) if mixed else [rope] * len(ropes)
            normed: Tensor = model.norm_pre(tokens)
            return normed

        def run(number: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, rope=ropes[number])

        blocks = [(name, partial(run, number, block)) for number, (name, block) in enumerate(self.blocks(model))]
        return head_stages(model, stem, blocks)

    def last_norm(self, model: Any) -> nn.Module | None:
        """None where tokens are pooled by attention after the norm."""
        return None if model.attn_pool is not None else super().last_norm(model)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes and tokens; all else is the architecture's own."""
        registers = 0 if model.reg_token is None else model.reg_token.shape[1]
        found = {"class_token": model.cls_token is not None, "num_reg_tokens": registers}
        if not model.global_pool and not isinstance(model.fc_norm, nn.Identity):  # pooling was taken away later
            found["use_fc_norm"] = True
        return super().arguments(model) | found | ({"dynamic_img_size": True} if model.dynamic_img_size else {})
