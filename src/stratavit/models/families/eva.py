"""timm's `Eva` (EVA, EVA-02, DINOv3, PE and other models with rotary positions) and `Beit` (BEiT, BEiT-v2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

from stratavit.models.families.base import Family, head_stages, sizes, with_bias
from stratavit.models.stages import Stages


class EvaFamily(Family):
    """ViTs with rotary positions."""

    title = "EVA"
    model = Eva
    fallback = "eva02_tiny_patch14_224"

    def stages(self, model: Eva) -> Stages:
        """Split at the blocks; sines and cosines come from the stem that ran last."""
        ropes: list[Tensor | None] = [None] * len(model.blocks)

        def stem(images: Tensor) -> Tensor:
            tokens, rope = model._pos_embed(model.patch_embed(images))
            mixed = getattr(model, "rope_mixed", False) and rope is not None
            ropes[:] = list(rope) if mixed else [rope] * len(ropes)
            tokens = model.norm_pre(tokens)
            assert isinstance(tokens, Tensor)
            return tokens

        def block(number: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda tokens: module(tokens, rope=ropes[number])

        blocks = [(name, block(number, module)) for number, (name, module) in enumerate(self.blocks(model))]
        return head_stages(model, stem, blocks)

    def last_norm(self, model: Eva) -> nn.Module | None:
        """None where tokens are pooled by attention after the norm."""
        if model.attn_pool is not None:
            return None
        return with_bias(model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm)

    def arguments(self, model: Eva) -> dict[str, Any]:
        """Sizes and tokens; all else is the architecture's own."""
        registers = 0 if model.reg_token is None else model.reg_token.shape[1]
        found = {"class_token": model.cls_token is not None, "num_reg_tokens": registers}
        return _arguments(model) | found | ({"dynamic_img_size": True} if model.dynamic_img_size else {})


class BeitFamily(Family):
    """ViTs with relative positions."""

    title = "BEiT"
    model = Beit
    fallback = "beit_base_patch16_224"

    def stages(self, model: Beit) -> Stages:
        """Split at the blocks; a bias that all blocks share comes from the stem that ran last."""
        shared: list[Tensor | None] = [None]

        def stem(images: Tensor) -> Tensor:
            tokens = model.patch_embed(images)
            tokens = torch.cat((model.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
            tokens = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
            shared[0] = None if model.rel_pos_bias is None else model.rel_pos_bias()
            return tokens

        def run(module: nn.Module, tokens: Tensor) -> Tensor:
            out: Tensor = module(tokens, shared_rel_pos_bias=shared[0])
            return out

        return head_stages(model, stem, [(name, partial(run, module)) for name, module in self.blocks(model)])

    def last_norm(self, model: Beit) -> nn.Module | None:
        """The last norm before the head."""
        return with_bias(model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm)

    def arguments(self, model: Beit) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        return _arguments(model)


def _arguments(model: Any) -> dict[str, Any]:
    heads = [block.attn.num_heads for block in model.blocks if hasattr(block.attn, "num_heads")]
    return sizes(model) | {"depth": len(model.blocks)} | ({"num_heads": heads[0]} if heads else {})
