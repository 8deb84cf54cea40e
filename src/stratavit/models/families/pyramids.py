"""timm's `PoolingVisionTransformer` (PiT), `Twins` and `Nest`: stages of ever fewer and wider tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.models.nest import Nest, blockify, deblockify
from timm.models.pit import PoolingVisionTransformer
from timm.models.twins import Twins
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, head_stages, with_bias

Steps = list[tuple[str, Callable[[Tensor], Tensor]]]


class Pyramid(Family):
    """What the families of this module share."""

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its stages have a fixed number of tokens"

    def last_norm(self, model: Any) -> nn.Module | None:
        """`norm`, the last layer in front of pooling and head."""
        return with_bias(model.norm)


class Pit(Pyramid):
    """PiT: tokens ``[B, P+N, C]``, of which a convolution pools the patches between stages."""

    title = "PiT"
    model = PoolingVisionTransformer
    fallback = "pit_ti_224"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for number, stage in enumerate(model.transformers):
            yield from ((f"transformers.{number}.blocks.{at}", block) for at, block in enumerate(stage.blocks))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where patches are pooled; the grid of patches comes from the stem that ran last."""
        prefix, grid = model.num_tokens, [0, 0]

        def stem(images: Tensor) -> Tensor:
            patches = model.pos_drop(model.patch_embed(images) + model.pos_embed)  # [B, C, H, W]
            grid[:] = patches.shape[2:]
            return joined(model.cls_token.expand(len(patches), -1, -1), patches)

        def pool(pooling: Callable[..., tuple[Tensor, Tensor]], tokens: Tensor) -> Tensor:
            patches = tokens[:, prefix:].transpose(1, 2).unflatten(2, tuple(grid))
            patches, first = pooling(patches, tokens[:, :prefix])
            grid[:] = patches.shape[2:]
            return joined(first, patches)

        steps: Steps = []
        for number, stage in enumerate(model.transformers):
            if stage.pool is not None:
                steps.append((f"transformers.{number}.pool", partial(pool, stage.pool)))
            steps += [(f"transformers.{number}.blocks.{at}", block) for at, block in enumerate(stage.blocks)]
        return head_stages(model, stem, steps, lambda tokens: model.norm(tokens[:, :prefix]))

    def last_norm(self, model: Any) -> nn.Module | None:
        """None for two heads."""
        return None if model.head_dist is not None else super().last_norm(model)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        embed = model.patch_embed
        return {
            "img_size": list(embed.img_size),
            "in_chans": embed.conv.in_channels,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "base_dims": list(model.base_dims),
            "heads": list(model.heads),
            "depth": [len(stage.blocks) for stage in model.transformers],
        }


def joined(first: Tensor, patches: Tensor) -> Tensor:
    """Tokens ``[B, P, C]`` in front of patches ``[B, C, H, W]``: ``[B, P+H*W, C]``."""
    return torch.cat((first, patches.flatten(2).transpose(1, 2)), dim=1)


class TwinsFamily(Pyramid):
    """Twins: windows and sub-sampled global attention in turns."""

    title = "Twins"
    model = Twins
    fallback = "twins_svt_small"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages."""
        for number, stage in enumerate(model.blocks):
            yield from ((f"blocks.{number}.{at}", block) for at, block in enumerate(stage))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks and where patches are merged; their grid comes from the embedding that ran last."""
        grid: list[int] = [0, 0]

        def embed(number: int, x: Tensor) -> Tensor:
            if number:  # tokens as an image: [B, N, C] to [B, C, H, W]
                x = x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2).contiguous()
            tokens, grid[:] = model.patch_embeds[number](x)
            dropped: Tensor = model.pos_drops[number](tokens)
            return dropped

        def run(block: Callable[..., Tensor], places: Callable[..., Tensor] | None, tokens: Tensor) -> Tensor:
            tokens = block(tokens, tuple(grid))
            return tokens if places is None else places(tokens, tuple(grid))

        steps: Steps = []
        for number, stage in enumerate(model.blocks):
            steps += [(f"patch_embeds.{number}", partial(embed, number))] if number else []
            for at, block in enumerate(stage):
                steps.append((f"blocks.{number}.{at}", partial(run, block, None if at else model.pos_block[number])))
        return head_stages(model, partial(embed, 0), steps, model.norm)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        first = model.patch_embeds[0]
        return {
            "img_size": list(first.img_size),
            "in_chans": model.in_chans,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "embed_dims": list(model.embed_dims),
            "num_heads": [stage[0].attn.num_heads for stage in model.blocks],
            "depths": list(model.depths),
        }


class NestFamily(Pyramid):
    """NesT: attention inside blocks of patches, ``[B, T, N, C]``; convolutions and pooling between the levels."""

    title = "NesT"
    model = Nest
    fallback = "nest_tiny"
    channels_last = False

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Layers of all levels."""
        for number, level in enumerate(model.levels):
            layers = enumerate(level.transformer_encoder)
            yield from ((f"levels.{number}.transformer_encoder.{at}", layer) for at, layer in layers)

    def stages(self, model: Any) -> Stages:
        """Split at the layers and between levels."""

        def enter(number: int, tokens: Tensor) -> Tensor:
            level = model.levels[number]
            image = level.pool(leave(number - 1, tokens) if number else tokens)
            blocks: Tensor = blockify(image.permute(0, 2, 3, 1), level.block_size) + level.pos_embed
            return blocks

        def leave(number: int, tokens: Tensor) -> Tensor:
            image: Tensor = deblockify(tokens, model.levels[number].block_size).permute(0, 3, 1, 2)
            return image  # [B, C, H, W]

        def features(tokens: Tensor) -> Tensor:
            image = leave(len(model.levels) - 1, tokens)
            normed: Tensor = model.norm(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return normed

        steps: Steps = []
        for number, level in enumerate(model.levels):
            steps += [(f"levels.{number}.pool", partial(enter, number))] if number else []
            layers = enumerate(level.transformer_encoder)
            steps += [(f"levels.{number}.transformer_encoder.{at}", layer) for at, layer in layers]
        return head_stages(model, lambda images: enter(0, model.patch_embed(images)), steps, features)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Size of images, classes and pooling; timm takes no other widths and depths than the architecture's own."""
        return {
            "img_size": list(model.patch_embed.img_size),
            "in_chans": model.patch_embed.proj.in_channels,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool.pool_type,
        }
