"""timm's `Cait`, `Xcit` and `VOLO`: the class token joins last, and reads the patches in blocks that stay uncut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from timm.models.cait import Cait
from timm.models.volo import VOLO
from timm.models.xcit import Xcit
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, head_stages, sizes, with_bias


class CaitFamily(Family):
    """CaiT: heads that talk to each other. The blocks of the class token stay uncut."""

    title = "CaiT"
    model = Cait
    fallback = "cait_xxs24_224"

    def merging(self, model: Any) -> int | str:
        """Never."""
        return "its attention is not one that can see merged tokens by their sizes"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks of the patches."""

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.pos_drop(model.patch_embed(images) + model.pos_embed)
            return tokens

        return self.staged(model, stem, list(self.blocks(model)))

    def staged(self, model: Any, stem: Callable[[Tensor], Tensor], blocks: Any) -> Stages:
        """Stages whose tail holds the blocks of the class token."""

        def features(tokens: Tensor) -> Tensor:
            normed: Tensor = model.norm(model.forward_cls(tokens))
            return normed

        return head_stages(model, stem, blocks, features)

    def last_norm(self, model: Any) -> nn.Module | None:
        """`norm`, the last layer in front of pooling and head."""
        return with_bias(model.norm)

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        return {**sizes(model), "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}


class XcitFamily(CaitFamily):
    """XCiT: attention between channels instead of tokens."""

    title = "XCiT"
    model = Xcit
    fallback = "xcit_nano_12_p16_224"

    def stages(self, model: Any) -> Stages:
        """Split at the blocks; height and width in patches come from the stem that ran last."""
        grid: list[int] = [0, 0]

        def stem(images: Tensor) -> Tensor:
            tokens, grid[:] = model.patch_embed(images)
            if model.pos_embed is not None:
                places = model.pos_embed(len(tokens), *grid)  # [B, C, H, W]
                tokens = tokens + places.flatten(2).transpose(1, 2)
            dropped: Tensor = model.pos_drop(tokens)
            return dropped

        def run(block: Callable[..., Tensor], tokens: Tensor) -> Tensor:
            return block(tokens, *grid)

        return self.staged(model, stem, [(name, partial(run, block)) for name, block in self.blocks(model)])

    def layer_scale(self, model: Any, site: str) -> Tensor | None:
        """Its factors have names without a line in between."""
        name, _, leaf = site.rpartition(".")
        factors: Tensor = getattr(model.get_submodule(name), "gamma1" if leaf == "attn" else "gamma2")
        return factors

    def arguments(self, model: Any) -> dict[str, Any]:
        """Sizes; all else is the architecture's own."""
        patches = model.patch_embed
        return {
            "img_size": list(patches.img_size),
            "patch_size": patches.patch_size,
            "in_chans": model.in_chans,
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": model.blocks[0].attn.num_heads,
        }


class Volo(CaitFamily):
    """VOLO: outlook attention, then attention; tokens are maps ``[B, H, W, C]``."""

    title = "VOLO"
    model = VOLO
    fallback = "volo_d1_224"

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Blocks of all stages; what merges tokens in between is none."""
        for number, stage in enumerate(model.network):
            if isinstance(stage, nn.Sequential):
                yield from ((f"network.{number}.{at}", block) for at, block in enumerate(stage))

    def stages(self, model: Any) -> Stages:
        """Split at the blocks, where tokens are merged, and where positions are added."""

        def stem(images: Tensor) -> Tensor:
            tokens: Tensor = model.patch_embed(images).permute(0, 2, 3, 1)
            return tokens

        def features(tokens: Tensor) -> Tensor:
            patches = tokens.flatten(1, 2)  # [B, H*W, C]
            normed: Tensor = model.norm(patches if model.post_network is None else model.forward_cls(patches))
            return normed

        steps: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        for number, stage in enumerate(model.network):
            if number == 2 and model.pos_embed is not None:
                steps.append(("pos_embed", lambda tokens: model.pos_drop(tokens + model.pos_embed)))
            if isinstance(stage, nn.Sequential):
                steps += [(f"network.{number}.{at}", block) for at, block in enumerate(stage)]
            else:
                steps.append((f"network.{number}", stage))
        return head_stages(model, stem, steps, features)

    def last_norm(self, model: Any) -> nn.Module | None:
        """None for two heads."""
        return None if model.aux_head is not None else super().last_norm(model)

    def fixed_size(self, model: Any) -> tuple[int, int] | None:
        """Its positions are those of one size."""
        if model.pos_embed is None:
            return None
        first, stem = model.patch_embed.proj.stride[0], model.patch_embed.conv
        stride = first * (1 if stem is None else stem[0].stride[0]) * model.pooling_scale
        return stride * model.pos_embed.shape[1], stride * model.pos_embed.shape[2]

    def arguments(self, model: Any) -> dict[str, Any]:
        """Size of images, classes and pooling; timm takes no other widths and depths than the architecture's own."""
        size = self.fixed_size(model)
        found = {"in_chans": model.in_chans, "num_classes": model.num_classes, "global_pool": model.global_pool}
        return found if size is None else {"img_size": list(size), **found}
