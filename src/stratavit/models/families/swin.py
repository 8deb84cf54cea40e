"""timm's `SwinTransformer` and `SwinTransformerV2`: stages of windows, tokens merged in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from stratavit.models.families.base import Family, Stages, head_stages, heads_of, sizes, with_bias


class Swin(Family):
    """The paper's second family."""

    title = "Swin"
    model = SwinTransformer
    fallback = "swin_tiny_patch4_window7_224"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for number, stage in enumerate(model.layers):
            yield from ((f"layers.{number}.blocks.{index}", block) for index, block in enumerate(stage.blocks))

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its windows have a fixed number of tokens"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where patches are merged."""
        steps: list[tuple[str, nn.Module]] = []
        for number, stage in enumerate(model.layers):
            steps.append((f"layers.{number}.downsample", stage.downsample))
            steps += [(f"layers.{number}.blocks.{index}", block) for index, block in enumerate(stage.blocks)]
        return head_stages(model, model.patch_embed, steps)

    def last_norm(self, model: Any) -> nn.Module | None:
        """`norm`: a shift of all tokens is a shift of their mean."""
        return with_bias(model.norm) if model.global_pool in ("avg", "") else None

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        windows = [max(list(block.window_size) for block in stage.blocks) for stage in model.layers]
        heads = [heads_of(stage.blocks) for stage in model.layers]
        first = model.layers[0].blocks[0]
        return {
            **({} if None in heads else {"num_heads": heads}),
            **sizes(model),
            "depths": [len(stage.blocks) for stage in model.layers],
            "window_size": windows[0] if all(window == windows[0] for window in windows) else windows,
            "mlp_ratio": first.mlp_ratio,
            **({"strict_img_size": False} if first.dynamic_mask else {}),
        }


class SwinV2(Swin):
    """Swin-V2: norms after the branches, cosine attention."""

    title = "Swin-V2"
    model = SwinTransformerV2
    fallback = "swinv2_tiny_window8_256"
