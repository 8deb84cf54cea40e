"""The layers that sites become in a small model: their numbers as plain data, and the layers built from these."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import nn

from stratavit.elastic.plain import Constant, SplitAttention
from stratavit.errors import ArtifactError

KEPT = ("q_norm", "k_norm", "logit_scale", "relative_position_bias_table", "cpb_mlp")  # never cut
KEPT_BUFFERS = ("relative_coords_table", "relative_position_index")
ATTENTION: tuple[Any, ...] = (
    Attention,
    AttentionRope,
    EvaAttention,
    BeitAttention,
    WindowAttention,
    WindowAttentionV2,
    SplitAttention,
)
Attn = TypeVar("Attn", bound=nn.Module)


def describe_layer(name: str, module: nn.Module) -> dict[str, Any]:
    """The numbers that fix one attention, MLP or constant module.

    Raises:
        ArtifactError: It is none of those that `build_layer` builds.
    """
    if isinstance(module, Constant):
        return {"constant": 0 if module.bias is None else module.bias.numel()}
    if isinstance(module, SplitAttention):
        biases = [layer.bias is not None for layer in (module.q, module.k, module.v, module.proj)]
        return {
            "num_heads": module.num_heads,
            "qk_dim": module.qk_dim,
            "v_dim": module.v_dim,
            "scale": module.scale,
            "biases": biases,
        }
    attn: Any = module
    if isinstance(module, ATTENTION):
        return {
            "num_heads": attn.num_heads,
            "head_dim": attn.proj.in_features // attn.num_heads,
            "qkv_bias": attn.qkv is not None and attn.qkv.bias is not None,
            "proj_bias": attn.proj.bias is not None,
        }
    if isinstance(module, Mlp | GluMlp | SwiGLU):
        first: Any = module.fc1_g if isinstance(module, SwiGLU) else module.fc1
        return {
            "hidden_features": module.fc2.in_features,
            "fc1_bias": first.bias is not None,
            "fc2_bias": module.fc2.bias is not None,
        }
    raise ArtifactError(f"cannot describe {name}: a {type(module).__name__} is none of the layers that a site becomes")


def build_layer(
    numbers: Mapping[str, Any],
    dim: int,
    like: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A layer with untrained weights.

    Args:
        numbers: See `describe_layer`.
        dim: Token width C.
        like: The module that it takes the place of, stock or elastic: gives what the numbers do not say.
        device, dtype: Of the weights.
    """
    if "constant" in numbers:
        return Constant(int(numbers["constant"]), device, dtype)
    if "qk_dim" in numbers:
        return _split(numbers, dim, like, device, dtype)
    if "head_dim" in numbers:
        return _attention(numbers, dim, like, device, dtype)
    return _mlp(numbers, dim, like, device, dtype)


def _attention(numbers: Mapping[str, Any], dim: int, like: Any, device: Any, dtype: Any) -> nn.Module:
    rates = {"attn_drop": _rate(like, "attn_drop"), "proj_drop": _rate(like, "proj_drop")}
    heads, width, bias = numbers["num_heads"], numbers["head_dim"], numbers["qkv_bias"]
    if hasattr(like, "window_area"):  # Swin
        windows = WindowAttention(
            dim, heads, head_dim=width, window_size=like.window_size, qkv_bias=bias, device=device, dtype=dtype, **rates
        )
        windows.proj = nn.Linear(heads * width, dim, numbers["proj_bias"], device, dtype)
        return _with_kept(windows, like)
    attn = Attention(
        # the width check of timm's constructor does not apply: attn_head_dim is given
        dim,
        num_heads=heads,
        attn_head_dim=width,
        qkv_bias=bias,
        proj_bias=numbers["proj_bias"],
        device=device,
        dtype=dtype,
        **rates,
    )
    attn.fused_attn = getattr(like, "fused_attn", attn.fused_attn)
    return attn


def _split(numbers: Mapping[str, Any], dim: int, like: Any, device: Any, dtype: Any) -> SplitAttention:
    q, k, v, proj = (bool(bias) for bias in numbers["biases"])
    prefix, half = getattr(like, "num_prefix_tokens", 0), bool(getattr(like, "rotate_half", False))
    widths = numbers["num_heads"], numbers["qk_dim"], numbers["v_dim"]
    attn = SplitAttention(dim, *widths, numbers["scale"], (q, k, v, proj), prefix, half, device, dtype)
    attn.attn_drop.p, attn.proj_drop.p = _rate(like, "attn_drop"), _rate(like, "proj_drop")
    return _with_kept(attn, like)


@torch.no_grad()
def _with_kept(attn: Attn, like: Any) -> Attn:
    """Copies the parts that are never cut, values included."""
    for name in (*KEPT, *KEPT_BUFFERS):
        part = getattr(like, name, None)
        if part is not None:
            setattr(attn, name, copy.deepcopy(part))
    return attn


def _mlp(numbers: Mapping[str, Any], dim: int, like: Any, device: Any, dtype: Any) -> nn.Module:
    hidden, bias = numbers["hidden_features"], (numbers["fc1_bias"], numbers["fc2_bias"])
    rest = {"bias": bias, "drop": (_rate(like, "drop1"), _rate(like, "drop2")), "device": device, "dtype": dtype}
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
