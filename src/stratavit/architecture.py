"""A model's architecture as JSON, and back: ``timm.create_model(name, **args)`` plus one line per site.

Only plain data is read and written, so loading a model never runs code from a file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention, DropPath, LayerScale, Mlp, PatchDropout, get_act_layer, get_norm_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stratavit.errors import ArtifactError

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
_NORMS = ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32")


class Constant(nn.Module):
    """Stands in for a module cut to width 0: adds one learnt vector to every token, or nothing.

    Args:
        dim: Token width C; 0 for a module that adds nothing.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if dim else None

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Tokens ``[B, N, C]`` to the same constant for each; a stock timm block calls it like its module."""
        zeros = torch.zeros_like(x)
        return zeros if self.bias is None else zeros + self.bias


def describe(model: nn.Module) -> dict[str, Any]:
    """A JSON-ready description from which `build` makes the same architecture.

    Args:
        model: A timm `VisionTransformer`, dense or extracted.

    Returns:
        ``architecture`` and ``args`` for `timm.create_model`, and ``sites``: for every attention and MLP
        module its head_dim or hidden_features and its biases.

    Raises:
        ArtifactError: The model has a part that this description cannot express.
    """
    if not isinstance(model, VisionTransformer):
        raise ArtifactError(f"cannot describe a {type(model).__name__}: expected a timm VisionTransformer")
    config = getattr(model, "pretrained_cfg", None) or {}
    distilled = isinstance(model, VisionTransformerDistilled)
    fallback = "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224"
    name = config.get("architecture") or fallback
    description: dict[str, Any] = {
        "architecture": name if timm.is_model(name) else fallback,
        "args": _arguments(model),
        "norm_eps": float(getattr(model.blocks[0].norm1, "eps", 1e-6)),
        "sites": {},
    }
    for index, block in enumerate(model.blocks):
        description["sites"][f"blocks.{index}.attn"] = describe_site(f"blocks.{index}.attn", block.attn)
        description["sites"][f"blocks.{index}.mlp"] = describe_site(f"blocks.{index}.mlp", block.mlp)
    other = difference(build(description, device="meta"), model)
    if other:
        raise ArtifactError(f"cannot describe this model: {other} has a form that timm.create_model does not give")
    return description


def describe_site(name: str, module: nn.Module) -> dict[str, Any]:
    """The numbers that fix one attention, MLP or constant module."""
    if isinstance(module, Constant):
        return {"constant": 0 if module.bias is None else module.bias.numel()}
    if isinstance(module, Attention):
        return {
            "num_heads": module.num_heads,
            "head_dim": module.head_dim,
            "qkv_bias": module.qkv.bias is not None,
            "proj_bias": module.proj.bias is not None,
        }
    if isinstance(module, Mlp):
        return {
            "hidden_features": module.fc1.out_features,
            "fc1_bias": module.fc1.bias is not None,
            "fc2_bias": module.fc2.bias is not None,
        }
    raise ArtifactError(f"cannot describe {name}: a {type(module).__name__} is neither timm's Attention nor its Mlp")


def build(description: Mapping[str, Any], device: torch.device | str = "cpu") -> VisionTransformer:
    """The architecture that `describe` wrote, with untrained weights, built by timm.

    Raises:
        ArtifactError: The description is incomplete or timm cannot build it.
    """
    try:
        args = dict(description["args"])
        norm = partial(get_norm_layer(args.pop("norm_layer")), eps=float(description["norm_eps"]))
        if not timm.is_model(description["architecture"]):
            raise ArtifactError(f"timm {timm.__version__} has no model named {description['architecture']!r}")
        model = timm.create_model(description["architecture"], device=device, norm_layer=norm, **args)
        for name, site in description["sites"].items():
            parent, _, leaf = name.rpartition(".")
            block = model.get_submodule(parent)
            setattr(block, leaf, build_site(site, model.embed_dim, getattr(block, leaf), device))
    except ArtifactError:
        raise
    except Exception as error:  # a description from a file can be wrong in any way that timm does not check
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ArtifactError(f"the model description cannot be built: {type(error).__name__}: {reason}") from error
    assert isinstance(model, VisionTransformer)
    return model


def build_site(
    site: Mapping[str, Any], dim: int, like: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> nn.Module:
    """A stock timm layer (or `Constant`) of the described width.

    Args:
        site: What `describe_site` returned.
        dim: Token width C.
        like: The module it replaces; gives activation and dropout rates.
        device, dtype: Of the new layer.
    """
    if "constant" in site:
        return Constant(int(site["constant"]), device, dtype)
    if "head_dim" in site:
        attn = Attention(
            # the width check of timm's constructor does not apply: attn_head_dim is given
            dim,
            num_heads=site["num_heads"],
            attn_head_dim=site["head_dim"],
            qkv_bias=site["qkv_bias"],
            proj_bias=site["proj_bias"],
            attn_drop=_rate(like, "attn_drop"),
            proj_drop=_rate(like, "proj_drop"),
            device=device,
            dtype=dtype,
        )
        attn.fused_attn = getattr(like, "fused_attn", attn.fused_attn)
        return attn
    mlp = Mlp(
        dim,
        hidden_features=site["hidden_features"],
        bias=(site["fc1_bias"], site["fc2_bias"]),
        drop=(_rate(like, "drop1"), _rate(like, "drop2")),
        device=device,
        dtype=dtype,
    )
    mlp.act = copy.deepcopy(like.act)
    return mlp


def _rate(module: nn.Module, name: str) -> float:
    return float(getattr(getattr(module, name, None), "p", 0.0))


def _arguments(model: VisionTransformer) -> dict[str, Any]:
    """Constructor arguments of a VisionTransformer, read off the built model."""
    block, patches = model.blocks[0], model.patch_embed
    attentions = [b.attn for b in model.blocks if not isinstance(b.attn, Constant)]
    mlps = [b.mlp for b in model.blocks if not isinstance(b.mlp, Constant)]
    hidden = mlps[0].fc1.out_features if mlps else 4 * model.embed_dim
    return {
        "img_size": list(patches.img_size) if patches.img_size is not None else None,
        "patch_size": list(patches.patch_size),
        "in_chans": model.in_chans if hasattr(model, "in_chans") else patches.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attentions[0].num_heads if attentions else 1,
        "mlp_ratio": hidden / model.embed_dim,
        "qkv_bias": attentions[0].qkv.bias is not None if attentions else True,
        "proj_bias": attentions[0].proj.bias is not None if attentions else True,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patches.dynamic_img_pad,
        "act_layer": _named(mlps[0].act, _ACTIVATIONS, get_act_layer) if mlps else None,
        "norm_layer": _named(block.norm1, _NORMS, get_norm_layer) or "layernorm",
    }


def _named(layer: nn.Module, names: tuple[str, ...], lookup: Any) -> str | None:
    """timm's name for a layer's class; None for torch's own GELU, timm's default."""
    return next((name for name in names if type(layer) is lookup(name)), None)


def difference(built: nn.Module, model: nn.Module) -> str | None:
    """Name of the first part in which two models differ, apart from dropout rates; None if alike."""
    transient = (nn.Dropout, DropPath, PatchDropout, nn.Identity)

    def parts(root: nn.Module) -> dict[str, str]:
        modules = {name: m for name, m in root.named_modules() if not isinstance(m, transient)}
        lines = {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in modules.items() if name}
        return lines | {name: str(tuple(p.shape)) for name, p in root.named_parameters()}

    ours, theirs = parts(built), parts(model)
    for name in ("num_prefix_tokens", "global_pool", "no_embed_class", "pool_include_prefix"):
        ours[name], theirs[name] = str(getattr(built, name)), str(getattr(model, name))
    return next((name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)), None)


def resolve_data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, its input size checked against the model itself."""
    stored = getattr(model, "data_config", None)
    if isinstance(stored, dict):
        return dict(stored)
    config = dict(resolve_model_data_config(model))
    patches: Any = model.patch_embed
    channels = patches.proj.in_channels if hasattr(patches, "proj") else 3
    size = patches.img_size
    if size is not None:
        config["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        config[key] = tuple(float(x) for x in config[key])[:channels]
    return config
