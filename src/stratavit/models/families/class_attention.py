"""timm's `Xcit` and `Cait`: ViTs whose class token joins after the last block and reads the patches in blocks of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models.cait import Cait
from timm.models.xcit import Xcit
from torch import Tensor, nn

from stratavit.models.families.base import Family, Stages, mean_token, sizes, with_bias


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

        return Stages(
            stem=stem,
            blocks=tuple(blocks),
            tail=lambda tokens: model.forward_head(features(tokens)),
            pool=lambda tokens: mean_token(model.forward_head(features(tokens), pre_logits=True)),
        )

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
