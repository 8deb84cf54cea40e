"""Where six classes of Hugging Face transformers keep what timm's models hold: names and sizes, as of release 5.18."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ACTIVATIONS = {"gelu": None, "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_ACTIVATIONS |= {name: name for name in ("quick_gelu", "relu", "silu")}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass(frozen=True)
class Layout:
    """One class of transformers.

    Attributes:
        architecture: timm's name of a model of the same form.
        arguments: Of `timm.create_model`, from the configuration.
        names: Name there -> name in timm, outside the blocks; a name stands for the tensors below it, too.
        block: Name of block i there, ``{}`` for its number (or for stage and number).
        inside: Name within a block there -> within timm's.
        normal: Mean and std that the weights published under this class expect.
        attention: Name of the attention module within a block there; the other one is ``mlp``.
        out: Name of the map out of the heads, within `attention`.
        scale: Attribute of `attention` that holds the factor of the scores.
    """

    architecture: str
    arguments: Callable[[Any], dict[str, Any]]
    names: Mapping[str, str]
    block: str
    inside: Mapping[str, str]
    normal: Mapping[str, tuple[float, ...]]
    attention: str = "attention"
    out: str = "o_proj"
    scale: str = "scaling"


def _plain(config: Any, **more: Any) -> dict[str, Any]:
    """Arguments of a plain ViT; a KeyError where timm has no such activation."""
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    mlp = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    return {
        "img_size": size,
        "patch_size": patch,
        "in_chans": config.num_channels,
        "num_classes": 0,
        "global_pool": "token",
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp / config.hidden_size,
        "qkv_bias": getattr(config, "qkv_bias", True),
        "act_layer": _ACTIVATIONS[config.hidden_act],
        "norm_layer": "layernorm",
        **more,
    }


def _dinov2(config: Any) -> dict[str, Any]:
    args = _plain(config, init_values=1e-5, dynamic_img_size=True)  # published for 518 pixels, processed to 224
    if config.use_swiglu_ffn:
        hidden = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        args |= {"mlp_ratio": 2 * hidden / config.hidden_size, "act_layer": None}
    return args


def _swin(config: Any) -> dict[str, Any]:
    return {
        "img_size": _pair(config.image_size),
        "patch_size": _pair(config.patch_size),
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "global_pool": "avg",
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": _pair(config.window_size),
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
    }


def _pair(size: Any) -> list[int]:
    return [int(side) for side in size] if isinstance(size, list | tuple) else [int(size), int(size)]


def _names(base: str) -> dict[str, str]:
    """Names outside the blocks of a ViT; those that a model does not have are of no effect."""
    return {
        f"{base}embeddings.cls_token": "cls_token",
        f"{base}embeddings.position_embeddings": "pos_embed",
        f"{base}embeddings.distillation_token": "reg_token",
        f"{base}embeddings.patch_embeddings.projection": "patch_embed.proj",
        f"{base}layernorm": "norm",
        "classifier": "head",
    }


_BEFORE_AFTER = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
_TOWER = {
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
}
_SELF_ATTENTION = {"attention": "self_attn", "out": "out_proj", "scale": "scale"}


LAYOUTS: dict[str, Layout] = {
    "ViTForImageClassification": Layout(
        "vit_base_patch16_224",
        lambda config: _plain(config, num_classes=config.num_labels),
        _names("vit."),
        "vit.layers.{}",
        _BEFORE_AFTER,
        normal=_HALF,
    ),
    "DeiTForImageClassification": Layout(
        "deit_base_patch16_224",
        lambda config: _plain(config, num_classes=config.num_labels, reg_tokens=1),
        _names("deit."),
        "deit.layers.{}",
        _BEFORE_AFTER,
        normal=_IMAGENET,
    ),
    "Dinov2Model": Layout(
        "vit_base_patch14_dinov2",
        _dinov2,
        _names(""),
        "encoder.layer.{}",
        {"norm1": "norm1", "norm2": "norm2", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"},
        normal=_IMAGENET,
    ),
    "CLIPVisionModel": Layout(
        "vit_base_patch16_clip_224",
        lambda config: _plain(config, pre_norm=True),
        {**_TOWER, "embeddings.class_embedding": "cls_token", "pre_layrnorm": "norm_pre"},
        "encoder.layers.{}",
        {"layer_norm1": "norm1", "layer_norm2": "norm2"},
        normal=_CLIP,
        **_SELF_ATTENTION,
    ),
    "SiglipVisionModel": Layout(
        "vit_base_patch16_siglip_224",
        lambda config: _plain(config, global_pool="map", class_token=False),
        {
            **_TOWER,
            "head.probe": "attn_pool.latent",
            "head.attention.out_proj": "attn_pool.proj",
            "head.layernorm": "attn_pool.norm",
            "head.mlp.fc1": "attn_pool.mlp.fc1",
            "head.mlp.fc2": "attn_pool.mlp.fc2",
        },
        "encoder.layers.{}",
        {"layer_norm1": "norm1", "layer_norm2": "norm2"},
        normal=_HALF,
        **_SELF_ATTENTION,
    ),
    "SwinForImageClassification": Layout(
        "swin_tiny_patch4_window7_224",
        _swin,
        {
            "swin.embeddings.patch_embeddings.projection": "patch_embed.proj",
            "swin.embeddings.norm": "patch_embed.norm",
            "swin.layernorm": "norm",
            "classifier": "head.fc",
        },
        "swin.encoder.layers.{}.blocks.{}",
        {
            **_BEFORE_AFTER,
            "attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
        },
        normal=_IMAGENET,
    ),
}
