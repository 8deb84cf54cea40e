"""Image towers of open_clip, turned into timm's equivalent on entry: its `VisionTransformer`, and its `TimmModel`.

The attention of the first is `nn.MultiheadAttention`, which cannot be cut; timm's computes the same. The second holds a
model of timm, perhaps with a projection of its own behind it. The towers are ``model.visual`` of what open_clip makes.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, resolve_model_data_config
from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.interop.timm_equivalent import check_equivalent, fill_equivalent
from stratavit.models import architecture
from stratavit.models.freezing import frozen_names
from stratavit.models.source_checks import whole_copy

_TOWERS = {("open_clip.transformer", "VisionTransformer"), ("open_clip.timm_model", "TimmModel")}
_PARTS = {  # a name stands for the tensors below it
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "ls_1": "ls1",
    "ls_2": "ls2",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "proj": "head.weight",
}
_ACTIVATIONS = {"GELU": None, "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}  # theirs -> timm's name
_CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}


def is_open_clip(model: Any) -> bool:
    """Whether it is one of the two towers; without importing that library."""
    return (type(model).__module__, type(model).__name__) in _TOWERS and hasattr(model, "image_size")


def to_timm(model: Any) -> nn.Module:
    """timm's equivalent of a tower, with copies of its weights, in eval mode; its output is an embedding.

    Raises:
        UnsupportedModelError: Something in it has no counterpart in timm.
    """
    made = _trunk(model) if hasattr(model, "trunk") else _vit(model)
    made.embedding = True
    return made


def _refuse(part: str, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"cannot cut this open_clip tower: {part} {reason}")


def _vit(model: Any) -> Any:
    """timm's `VisionTransformer` of open_clip's."""
    blocks = model.transformer.resblocks
    for number, block in enumerate(blocks):
        if type(block).__name__ != "ResidualAttentionBlock" or hasattr(block, "ln_1_kv"):
            _refuse(f"transformer.resblocks.{number}", f"is a {type(block).__name__}, which timm does not have")
        if block.mlp.gelu.__class__.__name__ not in _ACTIVATIONS:
            _refuse(f"transformer.resblocks.{number}.mlp.gelu", f"is a {type(block.mlp.gelu).__name__}")
    if model.attn_pool is not None or model.pool_type not in ("tok", "avg"):
        _refuse("pooling", "is not the class token or the mean of the patches")
    if model.output_tokens:
        _refuse("output_tokens", "is set: the output should be one embedding; set it to False")
    first, scale = blocks[0], hasattr(blocks[0].ls_1, "gamma")
    after_pool = model.final_ln_after_pool and model.pool_type == "avg"
    args = {
        "img_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "in_chans": model.conv1.in_channels,
        "num_classes": 0 if model.proj is None else model.proj.shape[1],
        "global_pool": {"tok": "token", "avg": "avg"}[model.pool_type],
        "embed_dim": model.conv1.out_channels,
        "depth": len(blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": first.mlp.c_fc.out_features / first.mlp.c_fc.in_features,
        "init_values": 1e-5 if scale else None,
        "pre_norm": not isinstance(model.ln_pre, nn.Identity),
        "fc_norm": after_pool,
        "act_layer": _ACTIVATIONS[type(first.mlp.gelu).__name__],
        "norm_layer": "layernorm",
    }
    eps = float(model.ln_post.eps)
    made = architecture.build({"architecture": "vit_base_patch16_clip_224", "args": args, "norm_eps": eps, "sites": {}})
    names = {**_PARTS, "ln_post": "fc_norm" if after_pool else "norm"}
    state = {_renamed(name, names): tensor for name, tensor in model.state_dict().items()}
    return fill_equivalent(made, model, _shaped(state, made), _frozen(model, names), _data_config(model))


def _renamed(name: str, parts: dict[str, str]) -> str:
    """timm's name of a tensor; what timm does not have keeps its own."""
    block, inner = "", name
    if found := re.match(r"transformer\.resblocks\.(\d+)\.", name):
        block, inner = f"blocks.{found[1]}.", name[found.end() :]
    for theirs, ours in parts.items():
        if inner == theirs or inner.startswith(f"{theirs}."):
            return block + ours + inner.removeprefix(theirs)
    return block + inner


def _frozen(model: nn.Module, parts: dict[str, str]) -> list[str]:
    """Frozen parameters under timm's names; the head's bias, which is new, follows its weight."""
    found = [_renamed(name, parts) for name in frozen_names(model)]
    return found + ["head.bias"] * ("head.weight" in found)


def _shaped(state: dict[str, Tensor], made: Any) -> dict[str, Tensor]:
    """The same tensors in timm's shapes, with biases of zeros where only timm has some."""
    own = made.state_dict()
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    state["pos_embed"] = state["pos_embed"].unsqueeze(0)
    if "head.weight" in state:
        state["head.weight"] = state["head.weight"].T.contiguous()
    for name in ("head.bias", "patch_embed.proj.bias"):
        if name in own and name not in state:
            state[name] = torch.zeros_like(own[name]).to(state["cls_token"])
    return state


def _trunk(model: Any) -> Any:
    """A copy of a `TimmModel`'s trunk, the projection behind it as its head."""
    layers = [layer for layer in model.head if not isinstance(layer, nn.Dropout | nn.Identity)]
    if len(layers) > 1 or not all(type(layer) is nn.Linear for layer in layers):
        _refuse("head", f"is more than one linear layer ({', '.join(type(layer).__name__ for layer in layers)})")
    if layers and model.trunk.num_classes:
        _refuse("head", f"follows a trunk with {model.trunk.num_classes} classes")
    made: Any = whole_copy(model.trunk).eval()
    if layers:
        projection = layers[0]
        made.reset_classifier(projection.out_features)
        head = made.get_classifier()
        if not isinstance(head, nn.Linear):
            _refuse("trunk", f"has a {type(head).__name__} as its classifier, expected a linear layer")
        with torch.no_grad():
            head.to(projection.weight).weight.copy_(projection.weight)
            head.bias.zero_() if projection.bias is None else head.bias.copy_(projection.bias)
        for parameter in head.parameters():
            parameter.requires_grad_(projection.weight.requires_grad)
    made.data_config = {**resolve_model_data_config(made), **_prepared(model)}
    check_equivalent(made, model, made.data_config["input_size"])
    return made


def _data_config(model: Any) -> dict[str, Any]:
    """How images are prepared: as open_clip says, or as CLIP does."""
    clip = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "interpolation": "bicubic", "crop_mode": "center"}
    return {"input_size": (model.conv1.in_channels, *model.image_size), **clip, "crop_pct": 1.0, **_prepared(model)}


def _prepared(model: Any) -> dict[str, Any]:
    """What `create_model_and_transforms` has noted on a tower, in timm's words."""
    noted = dict(getattr(model, "preprocess_cfg", None) or {})
    found: dict[str, Any] = {key: tuple(noted[key]) for key in ("mean", "std") if key in noted}
    if noted.get("interpolation") in ("bicubic", "bilinear"):
        found["interpolation"] = noted["interpolation"]
    if noted.get("resize_mode") in _CROPS:
        found |= {"crop_mode": _CROPS[noted["resize_mode"]], "crop_pct": 1.0}
    return found
