"""What relative positions add to the scores of attention, in the several forms of timm's modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stratavit.elastic.plain import added_up, by_head, gathered, swin_v2_bias


def position_bias(module: Any, shared: Tensor | None = None) -> Tensor | None:
    """What a module adds to the scores, ``[1, H, N, N]``, and `shared`; None for nothing.

    Args:
        module: Attention with the parts of timm's module; `plain.SplitAttention` computes the same.
        shared: What all blocks add.
    """
    if getattr(module, "rel_pos", None) is not None:
        return added_up(module.rel_pos.get_bias(), shared)
    if getattr(module, "meta_mlp", None) is not None:
        return added_up(by_head(module.meta_mlp(module.relative_coordinates_log)), shared)
    table = getattr(module, "relative_position_bias_table", None)
    if getattr(module, "cpb_mlp", None) is not None:
        table = swin_v2_bias(module.cpb_mlp(module.relative_coords_table))
    return gathered(table, getattr(module, "relative_position_index", None), shared)
