"""The two modules of a small model that timm does not have: plain torch, which needs nothing else of this library.

Both can be compiled by `torch.jit.script`, which reads their annotations: it knows ``Optional[Tensor]``, but neither
``Tensor | None`` nor ``from __future__ import annotations``.

Shape legend: B images (or windows), N tokens, C token width, H heads, a width of q and k, b width of v.
"""

# ruff: noqa: UP045

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Constant(nn.Module):
    """Stands in for a module cut to width 0: adds one learnt vector to every token, or nothing.

    Args:
        dim: Token width C; 0 for a module that adds nothing.
    """

    is_constant = True  # for blocks that leave it out

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if dim else None

    def forward(
        self,
        x: Tensor,
        shared_rel_pos_bias: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        rope: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
        shared_rel_pos: Optional[Tensor] = None,
    ) -> Tensor:
        """Tokens ``[B, N, C]`` to the same constant for each; the other arguments, see `SplitAttention`, do nothing."""
        zeros = torch.zeros_like(x)
        bias = self.bias
        return zeros if bias is None else zeros + bias


class SplitAttention(nn.Module):
    """Attention whose q and k have one width per head and v another; it does what several classes of timm do.

    Used where timm's own class has only one width. What a family needs beyond q, k, v and proj is put in place after
    construction, under timm's names: `q_norm`, `k_norm` (qk-norm), `logit_scale` (cosine attention),
    `relative_position_bias_table` or `cpb_mlp` with `relative_coords_table`, and `relative_position_index`; or
    `rel_pos`, a module of timm whose `get_bias` returns what is added to the scores; or `meta_mlp` with
    `relative_coordinates_log`; or `rel_pos_h` and `rel_pos_w` of tokens ``[B, H, W, C]``.

    Args:
        dim: Token width C.
        num_heads: H.
        qk_dim: Width a.
        v_dim: Width b.
        scale: Factor of the scores; that of the model that was cut, whatever a is.
        biases: Of q, k, v and proj.
        num_prefix_tokens: Tokens in front that are not rotated.
        rotate_half: Rotation pairs are coordinates i and i + a / 2, else 2 i and 2 i + 1.
        kept: q and k have some of the rotation pairs of the model only: a buffer `kept`, ``[a]``, says which columns.
        apart: Of two axes of tokens, ``[B, blocks, N, C]``, the first holds blocks that do not see each other.
        unit: Tokens of a mask unit (Hiera), if only these see each other; ``[B, unit * units, C]``, else 0.
    """

    kept: Optional[Tensor]
    relative_position_index: Optional[Tensor]
    relative_coords_table: Optional[Tensor]
    relative_coordinates_log: Optional[Tensor]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        biases: tuple[bool, bool, bool, bool] = (True, True, True, True),
        num_prefix_tokens: int = 0,
        rotate_half: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kept: bool = False,
        apart: bool = False,
        unit: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(qk_dim, dtype=torch.long, device=device) if kept else None)
        self.num_heads, self.qk_dim, self.v_dim, self.scale = num_heads, qk_dim, v_dim, scale
        self.num_prefix_tokens, self.rotate_half = num_prefix_tokens, rotate_half
        self.apart, self.unit = apart or unit > 0, unit
        self.q = nn.Linear(dim, num_heads * qk_dim, biases[0], device, dtype)
        self.k = nn.Linear(dim, num_heads * qk_dim, biases[1], device, dtype)
        self.v = nn.Linear(dim, num_heads * v_dim, biases[2], device, dtype)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.logit_scale: nn.Parameter | None = None  # [H, 1, 1] or [H]
        self.relative_position_bias_table: nn.Parameter | None = None  # [distances, H]
        self.cpb_mlp: nn.Module | None = None
        self.rel_pos: nn.Module | None = None
        self.rel_pos_h: nn.Parameter | None = None  # [distances, a]
        self.rel_pos_w: nn.Parameter | None = None
        self.meta_mlp: nn.Module | None = None
        self.register_buffer("relative_coordinates_log", None, persistent=False)  # [N*N, 2]
        self.register_buffer("relative_coords_table", None, persistent=False)
        self.register_buffer("relative_position_index", None, persistent=False)  # [N, N]
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(num_heads * v_dim, dim, biases[3], device, dtype)
        self.proj_drop = nn.Dropout(0.0)

    def forward(
        self,
        x: Tensor,
        shared_rel_pos_bias: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        rope: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
        shared_rel_pos: Optional[Tensor] = None,
    ) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``; accepts all that timm's blocks pass to their attention.

        Args:
            x: Tokens; for windowed attention all windows of all images. Or a map of them, ``[B, H, W, C]``.
            shared_rel_pos_bias: Added to the scores (BEiT); `shared_rel_pos` is its other name (ViTs of timm).
            mask: Of the windows of one image, ``[windows, N, N]``, added to the scores (Swin).
            rope: Sines and cosines of rotary positions, ``[..., N, 2 a]``.
            attn_mask: Added to the scores, or False where a token is not seen.
            is_causal: See `torch.nn.functional.scaled_dot_product_attention`.
        """
        shape, sides = x.shape, x.shape[1:-1]
        if self.unit > 0:
            x = x.unflatten(1, (self.unit, -1)).transpose(1, 2)  # [B, units, N, C]
        x = x.flatten(0, -3) if self.apart else x.flatten(1, -2)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, a]
        k = self.k(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, b]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rope = picked(rope, self.kept)
            q = rotated(q, rope, self.num_prefix_tokens, self.rotate_half).type_as(v)
            k = rotated(k, rope, self.num_prefix_tokens, self.rotate_half).type_as(v)
        scale, logit_scale = self.scale, self.logit_scale
        if logit_scale is not None:
            q, k, scale = cosines(q, k, logit_scale)
        table: Optional[Tensor] = self.relative_position_bias_table
        coords = self.relative_coords_table
        if self.cpb_mlp is not None and coords is not None:
            table = swin_v2_bias(self.cpb_mlp(coords))
        shared = shared_rel_pos_bias if shared_rel_pos is None else shared_rel_pos
        if self.rel_pos is not None:
            shared = added_up(self.rel_pos.get_bias(), shared)  # type: ignore[operator]
        pairs = self.relative_coordinates_log
        if self.meta_mlp is not None and pairs is not None:
            shared = added_up(by_head(self.meta_mlp(pairs)), shared)
        bias = gathered(table, self.relative_position_index, shared)
        rows, columns = self.rel_pos_h, self.rel_pos_w
        if rows is not None and columns is not None:
            bias = added_up(decomposed_bias(q, rows, columns, sides[0], sides[1]), bias)
        if attn_mask is not None:
            bias = attn_mask if bias is None else bias + attn_mask
        drop = self.attn_drop.p if self.training else 0.0
        out = self.proj_drop(self.proj(attend(q, k, v, bias, mask, scale, drop, is_causal)))
        if self.unit > 0:
            out = out.unflatten(0, (shape[0], -1)).transpose(1, 2)
        return out.reshape(shape)


def cosines(q: Tensor, k: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """q and k of cosine attention, the temperature in q, and the factor of their products."""
    temperature = logit_scale.reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()  # Swin-V2's bound
    return F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1), 1.0


def picked(rope: Tensor, kept: Optional[Tensor]) -> Tensor:
    """Sines and cosines ``[..., N, 2 d]`` of the columns ``[a]`` that are kept, ``[..., N, 2 a]``; None keeps all."""
    if kept is None:
        return rope
    sine, cosine = rope.tensor_split(2, dim=-1)
    return torch.cat([sine.index_select(-1, kept), cosine.index_select(-1, kept)], dim=-1)


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary positions: every pair of coordinates of ``[B, H, N, a]`` turned, but for the `prefix` tokens in front."""
    sine, cosine = rope.tensor_split(2, dim=-1)
    left, turned = x[:, :, :prefix], x[:, :, prefix:]
    if half:
        first, second = turned.chunk(2, dim=-1)
        crossed = torch.cat([-second, first], dim=-1)
    else:
        crossed = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([left, turned * cosine + crossed * sine], dim=2)


def swin_v2_bias(learnt: Tensor) -> Tensor:
    """What every distance adds to the scores, ``[distances, H]``, from the output of Swin-V2's small MLP."""
    return 16 * learnt.flatten(0, 2).sigmoid()


def by_head(learnt: Tensor) -> Tensor:
    """What every pair of N tokens adds to the scores, ``[N*N, H]`` to ``[1, H, N, N]``."""
    tokens = int(learnt.shape[0] ** 0.5 + 0.5)
    return learnt.T.unflatten(-1, (tokens, tokens)).unsqueeze(0)


def gathered(table: Optional[Tensor], index: Optional[Tensor], shared: Optional[Tensor]) -> Optional[Tensor]:
    """The row of a table for every pair of tokens, ``[1, H, N, N]``, and what is shared by all blocks."""
    if table is None:
        return shared
    assert index is not None, "a table of relative positions comes with its index"
    return added_up(table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).unsqueeze(0), shared)


def decomposed_bias(q: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """What the distances of tokens of a map add to the scores, by row and by column: ``[B, H, N, N]``.

    Args:
        q: ``[B, H, N, a]``, before the factor of the scores.
        rows, columns: A vector for each distance, ``[2 * height - 1, a]``; of other lengths, interpolated.
    """
    q = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnhwc,hkc->bnhwk", q, by_distance(rows, height))
    by_column = torch.einsum("bnhwc,wkc->bnhwk", q, by_distance(columns, width))
    return (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4, 5).flatten(2, 3)


def by_distance(table: Tensor, side: int) -> Tensor:
    """The vector of every pair of positions along a side, ``[side, side, a]``."""
    if table.shape[0] != 2 * side - 1:
        table = F.interpolate(table.T.unsqueeze(0), size=2 * side - 1, mode="linear").squeeze(0).T
    places = torch.arange(side, device=table.device)
    return table[places.unsqueeze(1) - places + side - 1]


def added_up(bias: Tensor, shared: Optional[Tensor]) -> Tensor:
    """The sum of what a block and what all blocks add to the scores."""
    return bias if shared is None else bias + shared


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    scale: Optional[float],
    drop: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Values ``[B, H, N, b]`` mixed by softmax of the scores: ``[B, N, H*b]``; `mask` see `SplitAttention`."""
    if mask is not None:  # B holds the windows of one image after those of another
        bias = mask.unsqueeze(1) if bias is None else bias + mask.unsqueeze(1)  # [windows, H, N, N]
        bias = bias.unsqueeze(0).expand(q.shape[0] // len(mask), -1, -1, -1, -1).flatten(0, 1)  # [B, H, N, N]
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, bias, drop, is_causal, scale=scale)
    return mixed.transpose(1, 2).flatten(2)
