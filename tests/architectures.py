"""Small random models of every supported kind, by name: what the contract of `test_families` is checked on."""

from __future__ import annotations

from typing import Any

import timm
import torch
from helpers import CLASSES, enliven
from timm.models.vision_transformer import VisionTransformer
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
HEADLESS = {"num_classes": 0}
SMALL_IMAGES = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}  # of models for any size
NAFLEX_BARE = {"class_token": True, "global_pool": "token", "fc_norm": False, "final_norm": False}  # as C-RADIO
MAPS = {"num_classes": 0, "global_pool": ""}  # all tokens are returned
NAMES: dict[str, dict[str, Any]] = {  # timm's name -> arguments besides the sizes
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_rpn_224": {},  # norms after the branches
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": HEADLESS,  # attention pooling
    "vit_base_patch16_siglip_gap_224": HEADLESS,
    "vit_small_patch14_dinov2": HEADLESS,
    "vit_small_patch14_reg4_dinov2": HEADLESS,
    "vit_giant_patch14_dinov2": HEADLESS,  # SwiGLU, both maps in one
    "aimv2_large_patch14_224": HEADLESS,  # SwiGLU, two maps
    "vit_tiny_patch16_224.qk_norm": {"qk_norm": True},
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},  # a norm in the MLP, which stays uncut
    "vit_small_patch16_dinov3": HEADLESS,
    "vit_small_plus_patch16_dinov3": HEADLESS,
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_pe_core_tiny_patch16_384": HEADLESS,
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_srelpos_small_patch16_224": {},  # one bias for all blocks
    "vit_relpos_base_patch16_clsgap_224": {},
    "swin_tiny_patch4_window7_224": {},
    "swin_s3_tiny_224": {"window_size": 4},
    "swinv2_tiny_window8_256": {},
    "swinv2_cr_tiny_224": {},
    "samvit_base_patch16": {"window_size": 3, "global_attn_indexes": (1,)},  # windows that are padded
    "samvit_base_patch16_224": {"window_size": 2, "global_attn_indexes": (1,)},
    "naflexvit_base_patch16_gap": SMALL_IMAGES,
    "naflexvit_base_patch16_siglip": SMALL_IMAGES | HEADLESS,  # attention pooling
    "naflexvit_base_patch16_par_gap": SMALL_IMAGES | NAFLEX_BARE,
    "vit_small_patch16_rope_mixed_224.naflex": {"use_naflex": True},
    "vit_tiny_patch16_224.maps": MAPS,
    "vit_small_patch14_reg4_dinov2.maps": MAPS,
    "vit_small_patch16_dinov3.maps": MAPS,
    "beit_base_patch16_224.maps": MAPS,
    "swin_tiny_patch4_window7_224.maps": MAPS,
}
STAGED: dict[str, dict[str, Any]] = {  # the same with all sizes of their own, for images of 32 pixels
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "pit_ti_224": {"img_size": 32, "base_dims": [16, 16, 16], "heads": [1, 2, 2], "depth": [1, 1, 1]},
    "pit_s_distilled_224": {"img_size": 32, "base_dims": [16, 16, 16], "heads": [1, 2, 2], "depth": [1, 1, 1]},
    "twins_svt_small": {
        "img_size": 32,
        "embed_dims": [16, 32, 32, 32],
        "num_heads": [1, 2, 2, 2],
        "depths": [2, 1, 1, 1],
    },
    "davit_tiny": {"embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]},
    "hiera_tiny_224": {"img_size": 32, "embed_dim": 16, "stages": [1, 1, 2, 1], "num_heads": 1},
    "sam2_hiera_tiny": {"embed_dim": 16, "stages": [1, 1, 3, 1], "num_heads": 1, "global_att_blocks": [3]},
}
WHOLE: dict[str, dict[str, Any]] = {  # the same of families of which timm builds no smaller models
    "nest_tiny": {"img_size": 32},
    "gcvit_xxtiny": {"img_size": 64, "window_ratio": (16, 16, 16, 32)},
    "mvitv2_tiny": {"img_size": 32},
    "volo_d1_224": {"img_size": 32},
}
TRANSFORMERS = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2Model",
    "CLIPVisionModel",
    "SiglipVisionModel",
    "SwinForImageClassification",
)
TORCHVISION = "torchvision vit_b_16"
KINDS = (  # a model of every family, and of every kind of attention, MLP and pooling
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_224.qk_norm",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_dinov2",
    "aimv2_large_patch14_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "samvit_base_patch16",
    "vit_small_patch14_reg4_dinov2.maps",
    "swin_tiny_patch4_window7_224.maps",
    "davit_tiny",
    "sam2_hiera_tiny",
)
ALL = (*NAMES, *STAGED, *TRANSFORMERS, "Dinov2Model, SwiGLU", TORCHVISION)


def make(name: str, **more: Any) -> nn.Module:
    """A small random model in eval mode; `more` are arguments of timm's constructor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return enliven(_made(name, more)).eval()


def side(name: str) -> int:
    """Of the images that a model of `make` takes, in pixels."""
    return int(WHOLE.get(name, {}).get("img_size", 32))


def _made(name: str, more: dict[str, Any]) -> nn.Module:
    if name == TORCHVISION:
        return _torchvision()
    if name.partition(",")[0] in TRANSFORMERS:
        return _transformers(name)
    if name.endswith(".qk_norm"):
        return VisionTransformer(**VIT, num_classes=CLASSES, qk_norm=True)
    if name in STAGED or name in WHOLE:
        return timm.create_model(name, **{"num_classes": CLASSES} | (STAGED | WHOLE)[name] | more)
    sizes = SWIN if name.startswith("swin") else VIT
    timms = name.removesuffix(".maps").removesuffix(".naflex")
    return timm.create_model(timms, **{"num_classes": CLASSES} | sizes | NAMES[name] | more)


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    return TorchvisionViT(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
    )


def _transformers(name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name.partition(",")[0])
    more: dict[str, Any] = HF
    if name.startswith("Swin"):
        more = {key: value for key, value in SWIN.items() if key != "img_size"} | {"image_size": 32}
    elif name.startswith("Dinov2"):
        more = {key: value for key, value in HF.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
        more |= {"use_swiglu_ffn": name.endswith("SwiGLU")}
    return kind(kind.config_class(**more, num_labels=CLASSES))
