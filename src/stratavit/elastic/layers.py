"""The layers that sites become in a small model: their numbers as plain data, and the layers built from these."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.davit import WindowAttention as DaVitAttention
from timm.models.eva import EvaAttention
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention as HieraDetAttention
from timm.models.nest import Attention as NestAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as MapAttention
from timm.models.volo import Attention as VoloAttention
from torch import Tensor, nn

from stratavit.elastic.plain import Constant, SplitAttention
from stratavit.errors import ArtifactError

KEPT = (  # never cut
    *("q_norm", "k_norm", "logit_scale"),
    *("relative_position_bias_table", "cpb_mlp", "rel_pos", "meta_mlp", "rel_pos_h", "rel_pos_w"),
)
KEPT_BUFFERS = ("relative_coords_table", "relative_position_index", "relative_coordinates_log")
STOCK = (
    *(Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention, MapAttention),
    *(WindowAttention, WindowAttentionV2, WindowMultiHeadAttention),
    *(NestAttention, DaVitAttention, VoloAttention, MaskUnitAttention, HieraDetAttention),
)
ATTENTION: tuple[Any, ...] = (*STOCK, SplitAttention)
RESHAPES = "where a stage begins, attention pools queries or widens tokens, and stays uncut"


def heads_in(attn: Any) -> int:
    """Heads of an attention module of timm."""
    return int(attn.heads if hasattr(attn, "heads") else attn.num_heads)


def describe_layer(name: str, module: Any) -> dict[str, Any]:
    """The numbers that fix one attention, MLP or constant module.

    Raises:
        ArtifactError: It is none of those that `build_layer` builds.
    """
    if isinstance(module, Constant):
        return {"constant": 0 if module.bias is None else module.bias.numel()}
    if isinstance(module, SplitAttention):
        numbers = {key: getattr(module, key) for key in ("num_heads", "qk_dim", "v_dim", "scale")}
        kept = {"kept": True} if module.kept is not None else {}
        return {**numbers, **kept, "biases": [getattr(module, key).bias is not None for key in ("q", "k", "v", "proj")]}
    if isinstance(module, STOCK):
        return {
            "num_heads": heads_in(module),
            "head_dim": module.proj.in_features // heads_in(module),
            "qkv_bias": module.qkv is not None and module.qkv.bias is not None,
            "proj_bias": module.proj.bias is not None,
        }
    if isinstance(module, Mlp | GluMlp | SwiGLU):
        first = module.fc1_g if isinstance(module, SwiGLU) else module.fc1
        in_bias, out_bias = first.bias is not None, module.fc2.bias is not None
        return {"hidden_features": module.fc2.in_features, "fc1_bias": in_bias, "fc2_bias": out_bias}
    raise ArtifactError(f"cannot describe {name}: a {type(module).__name__} is none of the layers that a site becomes")


@torch.no_grad()
def build_layer(numbers: Mapping[str, Any], dim: int, like: Any, device: torch.device | str) -> nn.Module:
    """A layer with untrained weights.

    Args:
        numbers: See `describe_layer`.
        dim: Token width C.
        like: The module that it takes the place of, stock or elastic: has what the numbers do not say, that is
            activation, dropout rates and the parts that are never cut, which are copied with their values.
        device: Of the weights.
    """
    if "constant" in numbers:
        return Constant(int(numbers["constant"]), device)
    if "hidden_features" in numbers:
        return _mlp(numbers, dim, like, device)
    layer = _split(numbers, dim, like, device) if "qk_dim" in numbers else _attention(numbers, dim, like, device)
    layer.attn_drop.p, layer.proj_drop.p = _rate(like, "attn_drop"), _rate(like, "proj_drop")
    return layer


def _attention(numbers: Mapping[str, Any], dim: int, like: Any, device: Any) -> Any:
    heads, width, bias = numbers["num_heads"], numbers["head_dim"], {"qkv_bias": numbers["qkv_bias"]}
    if hasattr(like, "window_area"):  # Swin
        windows = WindowAttention(dim, heads, head_dim=width, window_size=like.window_size, device=device, **bias)
        windows.proj = nn.Linear(heads * width, dim, numbers["proj_bias"], device)
        return _with_kept(windows, like)
    bias["proj_bias"] = numbers["proj_bias"]
    attn = Attention(dim, heads, attn_head_dim=width, device=device, **bias)
    attn.fused_attn = getattr(like, "fused_attn", attn.fused_attn)
    return _with_kept(attn, like)


def _split(numbers: Mapping[str, Any], dim: int, like: Any, device: Any) -> Any:
    q, k, v, proj = (bool(bias) for bias in numbers["biases"])
    prefix, half = getattr(like, "num_prefix_tokens", 0), bool(getattr(like, "rotate_half", False))
    widths = numbers["num_heads"], numbers["qk_dim"], numbers["v_dim"]
    kept, apart, unit = bool(numbers.get("kept")), in_blocks(like), unit_of(like)
    made = SplitAttention(
        dim, *widths, numbers["scale"], (q, k, v, proj), prefix, half, device, None, kept, apart, unit
    )
    return _with_kept(made, like)


def in_blocks(attn: Any) -> bool:
    """Whether tokens ``[B, blocks, N, C]`` of an attention, stock, elastic or small, see those of their block only."""
    return isinstance(attn, NestAttention) or getattr(attn, "apart", False)


def unit_of(attn: Any) -> int:
    """Tokens of a mask unit (Hiera) that see each other; 0 if all do."""
    return int(attn.window_size) if getattr(attn, "use_mask_unit_attn", False) else int(getattr(attn, "unit", 0))


def reshapes(attn: Any) -> bool:
    """Whether timm's module returns fewer or wider tokens than it reads, where a stage begins (Hiera)."""
    pools = getattr(attn, "q_pool", None) is not None or getattr(attn, "q_stride", 1) != 1
    return pools or (hasattr(attn, "dim_out") and attn.dim_out != attn.dim)


def tokens_in_view(attn: Any, x: Tensor) -> int:
    """Tokens that each of those that an attention reads attends to; x ``[B, ..., C]``."""
    if unit_of(attn):
        return unit_of(attn)
    return x.shape[-2] if in_blocks(attn) else x.shape[1:-1].numel()  # of a map [B, H, W, C] all


def _with_kept(attn: Any, like: Any) -> Any:
    for name in (*KEPT, *KEPT_BUFFERS):
        if getattr(like, name, None) is not None:
            setattr(attn, name, copy.deepcopy(getattr(like, name)))
    return attn


def _mlp(numbers: Mapping[str, Any], dim: int, like: Any, device: Any) -> Any:
    hidden, bias = numbers["hidden_features"], (numbers["fc1_bias"], numbers["fc2_bias"])
    rest = {"bias": bias, "drop": (_rate(like, "drop1"), _rate(like, "drop2")), "device": device}
    mlp: Any
    if hasattr(like, "fc1_g"):
        mlp = SwiGLU(dim, hidden, **rest)
    elif hasattr(like, "gate_last"):
        mlp = GluMlp(dim, 2 * hidden, gate_last=like.gate_last, **rest)
    else:
        mlp = Mlp(dim, hidden, **rest)
    mlp.act = copy.deepcopy(like.act)
    return mlp


def _rate(module: nn.Module, name: str) -> float:
    return float(getattr(getattr(module, name, None), "p", 0.0))
