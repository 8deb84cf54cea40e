"""timm's `NaFlexVit`, run on images of one size: ViTs whose positions fit any grid of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stratavit.elastic.merging import stock_class
from stratavit.models.families.base import Family, Stages, head_stages, heads_that_divide, refuse


class NaFlex(Family):
    """Blocks are those of plain ViTs or, with rotary positions, those of EVA."""

    title = "NaFlex ViT"
    model = NaFlexVit
    fallback = "naflexvit_base_patch16_gap"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The blocks, each with one attention and then one MLP; others are refused."""
        for name, block in super().blocks(model):
            if stock_class(block) not in (Block, EvaBlock):
                refuse(name, f"a {type(block).__name__} is not one of the blocks of plain ViTs and EVA")
            yield name, block

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; rotary positions come from the stem that ran last."""
        ropes: list[dict[str, Tensor]] = [{}] * len(model.blocks)

        def stem(images: Tensor) -> Tensor:
            found = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
            rope, tokens = found["rope_embeds"], found["patches"]
            if rope is not None:
                ropes[:] = [{"rope": one} for one in (rope if model.rope_is_mixed else [rope] * len(ropes))]
            assert isinstance(tokens, Tensor)
            return tokens

        def run(number: int, block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, **ropes[number])

        blocks = [(name, partial(run, number, block)) for number, (name, block) in enumerate(self.blocks(model))]
        return head_stages(model, stem, blocks)

    def last_norm(self, model: Any) -> nn.Module | None:
        """None where tokens are pooled by attention after the norm."""
        return None if model.attn_pool is not None else super().last_norm(model)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes and tokens; all else is the architecture's own."""
        embeds, pool = model.embeds, model.attn_pool
        heads = heads_that_divide(model.embed_dim, (block.attn for block in model.blocks))
        grid, side = embeds.pos_embed_grid_size, embeds.default_img_size
        own = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        name = getattr(model, "source_architecture", None) or own or self.fallback
        return {
            **({} if name.startswith("naflexvit") else {"use_naflex": True}),  # a plain ViT or an EVA in this form
            **({"num_heads": heads} if heads else {}),
            **({} if pool is None else {"attn_pool_num_heads": pool.num_heads}),  # never cut
            **({"img_size": list(side)} if side else {} if grid is None else {"pos_embed_grid_size": grid}),
            "patch_size": embeds.patch_size,
            "in_chans": model.in_chans,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "class_token": embeds.cls_token is not None,
            "reg_tokens": embeds.num_reg_tokens,
            "final_norm": not all(isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm)),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        }
