"""Widths in transformers' own terms: what its classes read of a configuration, so that its own loaders build a model.

Its vision classes read one head width (ViT, DeiT, DINOv2: ``head_dim``) and one hidden width (``intermediate_size`` or
``mlp_ratio``) for all blocks. None of ours reads ``per_layer_config``, as of release 5.24: they refuse it. Rounding
(SwiGLU) or a module that shares a width (the pooling of SigLIP) may be in the way; so what a class builds is compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stratavit.elastic.plain import Constant
from stratavit.interop.transformers.layouts import Layout
from stratavit.interop.transformers.weights import blocks_of, mlp_layers


def state_widths(model: Any, layout: Layout) -> bool:
    """Puts the widths of a model into its configuration, if its class then builds the same shapes.

    Args:
        model: Of transformers, with the layers that it is to have.
        layout: Of its class.

    Returns:
        Whether the configuration now describes the model; if not, it is as it was.
    """
    blocks = [(block.get_submodule(layout.attention), block.mlp) for _, block in blocks_of(model, layout)]
    if any(isinstance(module, Constant) for block in blocks for module in block):
        return False
    attention, mlp = blocks[0]
    out = getattr(mlp, mlp_layers(mlp)[1])
    hidden = _hidden_field(model.config, out.in_features, out.out_features)
    for fields in (hidden, {**hidden, "head_dim": attention.head_dim}):
        if _builds(model, fields):
            for key, value in fields.items():
                setattr(model.config, key, value)
            return True
    return False


def _hidden_field(config: Any, hidden: int, dim: int) -> dict[str, Any]:
    """The field that sets the hidden width of every MLP, and its value."""
    if hasattr(config, "intermediate_size"):
        return {"intermediate_size": hidden}
    if hidden % dim == 0:
        return {"mlp_ratio": hidden // dim}  # of some classes a whole number
    ratio = hidden / dim
    return {"mlp_ratio": ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)}


def _builds(model: Any, fields: dict[str, Any]) -> bool:
    """Whether the model's class builds its shapes from its configuration with other fields."""
    kind = type(model)
    try:
        config = kind.config_class.from_dict({**model.config.to_dict(), **fields})
        with torch.device("meta"):
            built = kind(config)
    except Exception:  # what a class refuses differs from release to release; then it does not build them
        return False
    ours, theirs = ({name: t.shape for name, t in one.state_dict().items()} for one in (model, built))
    return ours == theirs
