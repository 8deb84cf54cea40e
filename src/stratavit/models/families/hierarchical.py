"""timm's `DaVit`, `Hiera`, `HieraDet`, `GlobalContextVit` and `MultiScaleVit`: heads that also pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn

from stratavit.elastic.layers import heads_in
from stratavit.elastic.plain import Constant
from stratavit.models.families.base import Stages, head_stages, heads_of, pooling_of, refuse, with_bias
from stratavit.models.families.pyramids import Pyramid, Steps


class DaVitFamily(Pyramid):
    """DaViT: attention between tokens and between channels in turns; tokens are maps ``[B, C, H, W]``."""

    title = "DaViT"
    model = DaVit
    fallback = "davit_tiny"
    channels_last = False

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages, those of tokens and those of channels."""
        for number, stage in enumerate(model.stages):
            for at, pair in enumerate(stage.blocks):
                for leaf, block in pair.named_children():
                    name = f"stages.{number}.blocks.{at}.{leaf}"
                    if block.mlp is None:
                        refuse(name, "it has no MLP")
                    yield name, block

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where tokens are merged."""
        steps: Steps = []
        blocks = list(self.blocks(model))
        for number, stage in enumerate(model.stages):
            steps.append((f"stages.{number}.downsample", stage.downsample))
            steps += [(name, block) for name, block in blocks if name.startswith(f"stages.{number}.")]
        return head_stages(model, model.stem, steps, model.norm_pre)

    def last_norm(self, model: Any) -> nn.Module | None:
        """None: its last norm is one of maps."""
        return None

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        first = [next(stage.blocks[0].children()) for stage in model.stages]
        heads = [heads_of(block for pair in stage.blocks for block in pair.children()) for stage in model.stages]
        return {
            "in_chans": model.stem.conv.in_channels,
            "num_classes": model.num_classes,
            "global_pool": pooling_of(model),
            "depths": [len(stage.blocks) for stage in model.stages],
            "embed_dims": [block.norm1.normalized_shape[0] for block in first],
            **({} if None in heads else {"num_heads": heads}),
        }


class HieraFamily(Pyramid):
    """Hiera: queries are pooled where a stage begins; tokens are in the order of their units."""

    title = "Hiera"
    model = Hiera
    fallback = "hiera_tiny_224"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The blocks of all stages."""
        yield from ((f"blocks.{number}", block) for number, block in enumerate(model.blocks))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks."""

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.unroll(model._pos_embed(model.patch_embed(images)))
            return tokens

        return head_stages(model, stem, list(self.blocks(model)), nn.Identity())

    def last_norm(self, model: Any) -> nn.Module | None:
        """That of the head, after pooling."""
        return with_bias(model.head.norm)

    def fixed_size(self, model: Any) -> tuple[int, int] | None:
        """Its positions are those of one size."""
        (rows, columns), (down, right) = model.tokens_spatial_shape, model.patch_stride
        return rows * down, columns * right

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        return {"img_size": list(self.fixed_size(model) or ()), **_hiera_sizes(model)}


class HieraDetFamily(HieraFamily):
    """The image encoder of SAM 2: Hiera with windows, tokens ``[B, H, W, C]``."""

    title = "SAM 2's Hiera"
    model = HieraDet
    fallback = "sam2_hiera_tiny"

    def fixed_size(self, model: Any) -> tuple[int, int] | None:
        """None: its positions are stretched."""
        return None

    def stages(self, model: Any) -> Stages:
        """Split at the blocks."""
        return head_stages(
            model,
            lambda images: model._pos_embed(model.patch_embed(images)),
            list(self.blocks(model)),
            nn.Identity(),
        )

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        whole = [number for number, block in enumerate(model.blocks) if not block.is_windowed]
        return {**_hiera_sizes(model), "global_att_blocks": whole}


def _hiera_sizes(model: Any) -> dict[str, Any]:
    heads = [  # every stage has twice those of the one before
        heads_in(block.attn) >> sum(end < number for end in model.stage_ends)
        for number, block in enumerate(model.blocks)
        if not isinstance(block.attn, Constant)
    ]
    return {
        **({"num_heads": heads[0]} if heads else {}),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.head.pool_type,
        "embed_dim": model.blocks[0].norm1.normalized_shape[0],
        "stages": [end - start for start, end in pairwise([-1, *model.stage_ends])],
    }


class GcVit(Pyramid):
    """GC-ViT: windows that also see a summary of the whole image; tokens ``[B, H, W, C]``."""

    title = "GC-ViT"
    model = GlobalContextVit
    fallback = "gcvit_xxtiny"
    channels_last = False

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for number, stage in enumerate(model.stages):
            yield from ((f"stages.{number}.blocks.{at}", block) for at, block in enumerate(stage.blocks))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where stages begin; the summary is that of the stage that began last."""
        summary: list[Tensor] = [torch.empty(0)]

        def enter(number: int, tokens: Tensor) -> Tensor:
            if number:
                tokens = leave(number - 1, tokens)
            stage = model.stages[number]
            image = stage.downsample(tokens)  # [B, C, H, W]
            summary[0] = stage.global_norm(stage.global_block(image).permute(0, 2, 3, 1))
            mapped: Tensor = image.permute(0, 2, 3, 1)
            return mapped

        def leave(number: int, tokens: Tensor) -> Tensor:
            image: Tensor = model.stages[number].norm(tokens).permute(0, 3, 1, 2).contiguous()
            return image

        def run(block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, summary[0])

        steps: Steps = []
        for number, stage in enumerate(model.stages):
            steps.append((f"stages.{number}.downsample", partial(enter, number)))
            blocks = enumerate(stage.blocks)
            steps += [(f"stages.{number}.blocks.{at}", partial(run, block)) for at, block in blocks]
        return head_stages(model, model.stem, steps, partial(leave, len(model.stages) - 1))

    def last_norm(self, model: Any) -> nn.Module | None:
        """That of the last stage."""
        return with_bias(model.stages[-1].norm)

    def fixed_size(self, model: Any) -> tuple[int, int]:
        """Its windows are those of one size; the stem has strides of 4 in all."""
        height, width = model.stages[0].feat_size
        return 4 * height, 4 * width

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes of images and windows, classes and pooling; timm takes no other depths than the architecture's own."""
        return {
            "img_size": list(self.fixed_size(model)),
            "window_size": [list(stage.blocks[0].window_size) for stage in model.stages],
            "in_chans": model.in_chans,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
        }


class MViT(Pyramid):
    """MViT-V2: keys and values are pooled, and queries where a stage begins."""

    title = "MViT-V2"
    model = MultiScaleVit
    fallback = "mvitv2_tiny"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for number, stage in enumerate(model.stages):
            yield from ((f"stages.{number}.blocks.{at}", block) for at, block in enumerate(stage.blocks))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; the grid of patches is that of the block that ran before."""
        grids: list[Any] = [None] * (1 + len(list(self.blocks(model))))

        def stem(images: Tensor) -> Tensor:
            tokens, grids[0] = model.patch_embed(images)
            if model.cls_token is not None:
                tokens = torch.cat((model.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
            return tokens if model.pos_embed is None else tokens + model.pos_embed

        def run(number: int, block: Callable[..., tuple[Tensor, Any]], tokens: Tensor) -> Tensor:
            tokens, grids[number + 1] = block(tokens, grids[number])
            return tokens

        steps: Steps = [(name, partial(run, number, block)) for number, (name, block) in enumerate(self.blocks(model))]
        return head_stages(model, stem, steps, model.norm)

    def fixed_size(self, model: Any) -> tuple[int, int] | None:
        """That of its relative positions, of which there is one less than twice the tokens of a side."""
        attention, strides = model.stages[0].blocks[0].attn, model.patch_embed.proj.stride
        if attention.rel_pos_h is None:
            return None
        height, width = ((1 + len(table)) // 2 for table in (attention.rel_pos_h, attention.rel_pos_w))
        return height * strides[0], width * strides[1]

    def arguments(self, model: Any) -> dict[str, Any]:
        """Size of images, classes and pooling; timm takes no other widths and depths than the architecture's own."""
        size = self.fixed_size(model)
        found = {"in_chans": model.in_chans, "num_classes": model.num_classes, "global_pool": model.global_pool}
        return found if size is None else {"img_size": list(size), **found}
