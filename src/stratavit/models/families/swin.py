"""timm's `SwinTransformer` and both of its `SwinTransformerV2`: stages of windows, tokens merged in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, head_stages, heads_of, pooling_of, sizes, with_bias


class Swin(Family):
    """The paper's second family."""

    title = "Swin"
    model = SwinTransformer
    fallback = "swin_tiny_patch4_window7_224"
    layers: ClassVar[str] = "layers"  # attribute that holds the stages

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for name, step in self.steps(model):
            if not name.endswith(".downsample"):
                yield name, step

    def steps(self, model: Any) -> Iterator[tuple[str, nn.Module]]:
        """Blocks, and what merges patches before them."""
        for number, stage in enumerate(getattr(model, self.layers)):
            yield f"{self.layers}.{number}.downsample", stage.downsample
            yield from ((f"{self.layers}.{number}.blocks.{index}", block) for index, block in enumerate(stage.blocks))

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its windows have a fixed number of tokens"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where patches are merged."""
        return head_stages(model, model.patch_embed, self.steps(model))

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


class SwinV2Cr(Swin):
    """timm's first Swin-V2: cosine attention, a small MLP for positions, a norm at the end of its last block."""

    title = "Swin-V2, CR"
    model = SwinTransformerV2Cr
    fallback = "swinv2_cr_tiny_224"
    layers = "stages"
    channels_last = False

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where patches are merged; tokens are ``[B, H, W, C]``."""

        def head(tokens: Tensor, pre_logits: bool = False) -> Tensor:
            found: Tensor = model.forward_head(tokens.permute(0, 3, 1, 2), pre_logits=pre_logits)
            return found

        return Stages(
            stem=lambda images: model.patch_embed(images).permute(0, 2, 3, 1),
            blocks=tuple(self.steps(model)),
            tail=head,
            pool=lambda tokens: head(tokens, pre_logits=True),
        )

    def last_norm(self, model: Any) -> nn.Module | None:
        """That of the last block: a shift of all tokens is a shift of their mean."""
        return with_bias(model.stages[-1].blocks[-1].norm3) if pooling_of(model) == "avg" else None

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        first = model.stages[0].blocks[0]
        heads = [heads_of(stage.blocks) for stage in model.stages]
        return {
            **({} if None in heads else {"num_heads": heads}),
            **({"mlp_ratio": first.mlp.fc1.out_features / first.dim} if hasattr(first.mlp, "fc1") else {}),
            **sizes(model),
            "patch_size": model.patch_size,
            "depths": [len(stage.blocks) for stage in model.stages],
            "window_size": _windows(model),
            **({"strict_img_size": False} if first.dynamic_mask else {}),
        }


def _windows(model: Any) -> list[Any]:
    """The window of all stages, which none exceeds on the map that it reads; else the window of each."""
    whole, blocks = model.window_size, [block for stage in model.stages for block in stage.blocks]
    fitting = [tuple(map(min, whole, block.feat_size)) == tuple(block.window_size) for block in blocks]
    return list(whole) if all(fitting) else [list(stage.blocks[0].window_size) for stage in model.stages]
