"""timm's `VisionTransformer`: ViT, DeiT, DeiT-III, AugReg, CLIP and SigLIP towers, DINOv2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import LayerScale, get_act_layer, get_norm_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from stratavit.elastic.layers import ATTENTION, describe_layer
from stratavit.elastic.merging import stock_class
from stratavit.elastic.plain import Constant
from stratavit.models.families.base import Family, Stages, head_stages, heads_that_divide, refuse, sizes

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
_NORMS = ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32")


class Vit(Family):
    """Plain Vision Transformers."""

    title = "ViT"
    model = VisionTransformer
    fallback = "vit_tiny_patch16_224"
    has_buffers = False

    def blocks(self, model: VisionTransformer) -> Iterator[tuple[str, Any]]:
        """The blocks, each with one attention and then one MLP; others are refused."""
        for name, block in super().blocks(model):
            if stock_class(block) not in (Block, ResPostBlock):
                refuse(name, f"a {type(block).__name__} is not a sequential timm Block (attention, then MLP)")
            yield name, block

    def stages(self, model: VisionTransformer) -> Stages:
        """Split at the blocks."""

        def stem(images: Tensor) -> Tensor:
            return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

        return head_stages(model, stem, self.blocks(model))

    def merging(self, model: VisionTransformer) -> int | str:
        """Tokens are compared by what attention reads, which a block that normalises afterwards does not have."""
        if any(stock_class(block) is not Block for block in model.blocks):
            return "its blocks normalise after attention"
        return int(model.num_prefix_tokens)

    def last_norm(self, model: VisionTransformer) -> nn.Module | None:
        """None for two heads, and where tokens are pooled by attention after the norm."""
        none = isinstance(model, VisionTransformerDistilled) or model.attn_pool is not None
        return None if none else super().last_norm(model)

    def arguments(self, model: VisionTransformer) -> dict[str, Any]:
        """Read off the built model, which may be a small one."""
        block = model.blocks[0]
        return {
            **_attention_arguments(model),
            **_mlp_arguments(model),
            **sizes(model),
            "depth": len(model.blocks),
            "init_values": 1e-5 if isinstance(getattr(block, "ls1", None), LayerScale) else None,
            "class_token": model.cls_token is not None,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": model.no_embed_class,
            "reg_tokens": model.num_reg_tokens,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "final_norm": not all(isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm)),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "pool_include_prefix": model.pool_include_prefix,
            "dynamic_img_size": model.dynamic_img_size,
            "dynamic_img_pad": getattr(model.patch_embed, "dynamic_img_pad", False),
            "norm_layer": _named(block.norm1, _NORMS, get_norm_layer) or "layernorm",
        }


def _attention_arguments(model: VisionTransformer) -> dict[str, Any]:
    """What the attention modules that are left say; nothing if they are of a kind that stays uncut."""
    modules = [block.attn for block in model.blocks]
    measured = [describe_layer("", attn) for attn in modules if isinstance(attn, ATTENTION)]
    if not measured and not all(isinstance(attn, Constant) for attn in modules):
        return {}
    first = measured[0] if measured else {}
    biases = first.get("biases", [first.get("qkv_bias", True)] * 3 + [first.get("proj_bias", True)])
    pool = model.attn_pool  # built with the same number of heads, and never cut
    return {
        "num_heads": _heads(model, measured) if pool is None else pool.num_heads,
        "qkv_bias": biases[0],
        "qk_norm": any(not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity) for attn in modules),
        "proj_bias": biases[3],
    }


def _heads(model: VisionTransformer, measured: list[dict[str, Any]]) -> int:
    """Heads of the model that whole heads were cut from, else of its blocks."""
    if getattr(model, "whole_heads", False) and measured:
        return int(model.embed_dim // measured[0]["head_dim"])
    return heads_that_divide(model.embed_dim, (block.attn for block in model.blocks)) or 1


def _mlp_arguments(model: VisionTransformer) -> dict[str, Any]:
    """The same for MLPs."""
    modules = [block.mlp for block in model.blocks] if model.attn_pool is None else [model.attn_pool.mlp]
    known = [mlp for mlp in modules if hasattr(mlp, "fc2")]
    if not known:
        return {"mlp_ratio": 4.0, "act_layer": None} if all(isinstance(mlp, Constant) for mlp in modules) else {}
    features = known[0].fc1.out_features if hasattr(known[0], "fc1") else known[0].fc2.in_features  # both halves
    act = _named(known[0].act, _ACTIVATIONS, get_act_layer)
    return {"mlp_ratio": features / model.embed_dim, "act_layer": act}


def _named(layer: nn.Module, names: tuple[str, ...], lookup: Any) -> str | None:
    """timm's name of a layer's class; None for torch's own GELU, timm's default."""
    return next((name for name in names if type(layer) is lookup(name)), None)
