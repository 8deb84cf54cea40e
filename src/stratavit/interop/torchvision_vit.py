"""torchvision's `VisionTransformer` (vit_b_16 and its siblings), turned into timm's equivalent on entry.

Its attention is `nn.MultiheadAttention`, which cannot be cut; timm's computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.files.state_dicts import load_weights, unreachable
from stratavit.interop.timm_equivalent import fill_equivalent
from stratavit.interop.timm_filter import report_left_out, without_counters, without_prefixes
from stratavit.models import architecture
from stratavit.models.freezing import frozen_names

NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_PARTS = {  # a name stands for the tensors below it
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def is_torchvision(model: Any) -> bool:
    """Whether it is torchvision's ViT; without importing that library."""
    kind = type(model)
    return (kind.__module__, kind.__name__) == ("torchvision.models.vision_transformer", "VisionTransformer")


def to_timm(model: Any) -> nn.Module:
    """timm's equivalent of a model, with copies of its weights, in eval mode.

    Raises:
        UnsupportedModelError: Its stem or head is not the plain one.
    """
    heads = {f"heads.{name}".rstrip("."): head for name, head in model.heads.named_modules() if not [*head.children()]}
    linear = [name for name, head in heads.items() if isinstance(head, nn.Linear)]
    plain = all(isinstance(head, nn.Linear | nn.Identity | nn.Dropout | nn.Sequential) for head in heads.values())
    if not isinstance(model.conv_proj, nn.Conv2d) or len(linear) > 1 or not plain:
        raise UnsupportedModelError(
            "cannot cut this torchvision VisionTransformer: expected one convolution as stem and one linear head"
        )
    parts = _PARTS | dict.fromkeys(linear, "head")
    args = {
        "img_size": [model.image_size, model.image_size],
        "patch_size": [model.patch_size, model.patch_size],
        "in_chans": model.conv_proj.in_channels,
        "num_classes": heads[linear[0]].out_features if linear else 0,
        "global_pool": "token",
        "embed_dim": model.hidden_dim,
        "depth": len(model.encoder.layers),
        "num_heads": model.encoder.layers[0].num_heads,
        "mlp_ratio": model.mlp_dim / model.hidden_dim,
        "act_layer": None,
        "norm_layer": "layernorm",
    }
    eps = float(model.encoder.ln.eps)
    made = architecture.build({"architecture": "vit_base_patch16_224", "args": args, "norm_eps": eps, "sites": {}})
    state = {_renamed(name, parts): tensor for name, tensor in model.state_dict().items()}
    frozen = [_renamed(name, parts) for name in frozen_names(model)]
    data_config = {
        "input_size": (args["in_chans"], *args["img_size"]),
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    return fill_equivalent(made, model, state, frozen, data_config)


def named(name: str, weights: Mapping[str, Tensor] | None, source: str, num_classes: int | None = None) -> nn.Module:
    """timm's equivalent of torchvision's ViT of one of the `NAMES`, in eval mode.

    Args:
        weights: A state dict from `source`; torchvision's default weights, downloaded, if None.
        num_classes: Size of the head, if it is not 1,000; the head is new where weights are downloaded.

    Raises:
        ArtifactError: The weights do not fit.
        StrataViTError: They cannot be fetched.
    """
    import torchvision

    if weights is not None:
        model = torchvision.models.get_model(name, num_classes=num_classes or 1000)
        own = model.state_dict()
        short = without_prefixes(weights, own, source)
        kept = without_counters(short, own)
        report_left_out(short, kept, source)
        load_weights(model, kept, source)
        return to_timm(model)
    with unreachable(name):
        model = torchvision.models.get_model(name, weights="DEFAULT")
    made: Any = to_timm(model)
    if num_classes is not None:
        made.reset_classifier(num_classes)
    return made.eval()


def _renamed(name: str, parts: Mapping[str, str] = _PARTS) -> str:
    """timm's name of a tensor; what timm does not have keeps its own."""
    block, inner = "", name
    if found := re.match(r"encoder\.layers\.encoder_layer_(\d+)\.", name):
        block, inner = f"blocks.{found[1]}.", name[found.end() :]
    for theirs, ours in parts.items():
        if inner == theirs or inner.startswith(f"{theirs}."):
            return block + ours + inner.removeprefix(theirs)
    return block + inner
