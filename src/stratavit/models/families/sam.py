"""timm's `VisionTransformerSAM`: image encoders of Segment Anything; tokens are a map, in windows in most blocks."""

from __future__ import annotations

from typing import Any

from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, heads_of, sizes


class Sam(Family):
    """After the blocks a neck of two convolutions, or a norm; then the head, which pools."""

    title = "SAM"
    model = VisionTransformerSAM
    fallback = "samvit_base_patch16_224"
    channels_last = False

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; tokens are ``[B, H, W, C]``."""

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.patch_embed(images)
            if model.pos_embed is not None:
                tokens = tokens + resample_abs_pos_embed_nhwc(model.pos_embed, tokens.shape[1:3])
            positioned: Tensor = model.norm_pre(model.patch_drop(model.pos_drop(tokens)))
            return positioned

        def head(tokens: Tensor, pre_logits: bool = False) -> Tensor:
            found: Tensor = model.forward_head(model.neck(tokens.permute(0, 3, 1, 2)), pre_logits=pre_logits)
            return found

        blocks = tuple(self.blocks(model))
        return Stages(stem=stem, blocks=blocks, tail=head, pool=lambda tokens: head(tokens, pre_logits=True))

    def last_norm(self, model: Any) -> nn.Module | None:
        """None: that of the neck has its channels in front."""
        return None

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes and windows; all else is the architecture's own."""
        heads, windows = heads_of(model.blocks), [block.window_size for block in model.blocks]
        return {
            **({"num_heads": heads} if heads else {}),
            **sizes(model),
            "depth": len(model.blocks),
            "window_size": max(windows),
            "global_attn_indexes": [number for number, window in enumerate(windows) if not window],
            "use_abs_pos": model.pos_embed is not None,
        }
