"""timm's `VisionTransformerRelPos`: ViTs whose only positions are relative ones, added to the scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, head_stages, heads_of, sizes


class RelPos(Family):
    """Relative positions from a small MLP or a table, of every block or shared by all."""

    title = "ViT with relative positions"
    model = VisionTransformerRelPos
    fallback = "vit_relpos_small_patch16_224"

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its attention has a bias for every pair of patches (relative positions)"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; a bias that all blocks share comes from the stem that ran last."""
        shared: list[Tensor | None] = [None]

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.patch_embed(images)
            shared[0] = None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()
            if model.cls_token is None:
                return tokens
            return torch.cat((model.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)

        def run(block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, shared_rel_pos=shared[0])

        return head_stages(model, stem, [(name, partial(run, block)) for name, block in self.blocks(model)])

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes and the class token; all else is the architecture's own."""
        heads = heads_of(model.blocks)
        found = {"depth": len(model.blocks), "class_token": model.cls_token is not None}
        if not model.global_pool and not isinstance(model.fc_norm, nn.Identity):  # pooling was taken away later
            found["fc_norm"] = True
        return sizes(model) | found | ({"num_heads": heads} if heads else {})
