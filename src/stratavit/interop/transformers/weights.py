"""The weights of models of transformers under timm's names, and back. Names and sizes are those of `layouts`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from stratavit.elastic.plain import Constant
from stratavit.interop.transformers.layouts import Layout

Pair = tuple[list[str], list[str]]  # timm's names, and the names there; several on one side are stacked on the other


def blocks_of(model: Any, layout: Layout) -> list[tuple[str, Any]]:
    """timm's name and the module of every block, in order of execution."""
    layers = model.get_submodule(layout.block.partition(".{}")[0])
    if layout.block.count("{}") == 1:
        return [(f"blocks.{i}", layer) for i, layer in enumerate(layers)]
    return [(f"layers.{s}.blocks.{i}", b) for s, stage in enumerate(layers) for i, b in enumerate(stage.blocks)]


def mlp_layers(mlp: Any) -> tuple[list[str], str]:
    """Names of the maps into the hidden units, gate first, and of the one out of them."""
    return (["gate_proj", "up_proj"], "down_proj") if hasattr(mlp, "gate_proj") else (["fc1"], "fc2")


def to_state(model: Any, layout: Layout) -> dict[str, Tensor]:
    """timm's state dict."""
    state: dict[str, Tensor] = model.state_dict()
    made: dict[str, Tensor] = {}
    for ours, theirs in _tensors(model, layout):
        tensor = torch.cat([state[name] for name in theirs]) if len(theirs) > 1 else state[theirs[0]]
        if ours[0] in ("cls_token", "pos_embed"):  # timm's have a leading dimension
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        made |= zip(ours, tensor.tensor_split([len(tensor) // 3]) if len(ours) > 1 else [tensor], strict=True)
    return made


@torch.no_grad()
def load_state(model: Any, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Fills a model from timm's state dict; what timm has no place for stays as it is built."""
    own = model.state_dict()
    for ours, theirs in _tensors(model, layout):
        tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        for name, part in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            own[name].copy_(part.reshape(own[name].shape))


def frozen_of(model: Any, layout: Layout) -> list[str]:
    """timm's names of the parameters that are frozen there; of stacked ones, if all are."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return [name for ours, theirs in _tensors(model, layout) if frozen.issuperset(theirs) for name in ours]


def set_frozen_there(model: Any, layout: Layout, frozen: Collection[str]) -> None:
    """Freezes what timm's equivalent has frozen; what is stacked there only if all of it is."""
    for ours, theirs in _tensors(model, layout):
        for name in theirs:
            model.get_parameter(name).requires_grad_(not set(ours) <= set(frozen))


def _tensors(model: Any, layout: Layout) -> list[Pair]:
    """Where every tensor of a model lies."""
    state, found = model.state_dict(), []
    for ours, theirs in _places(model, layout):
        if theirs[0] in state:
            found.append((ours, theirs))
        for leaf in ("weight", "bias"):
            if f"{theirs[0]}.{leaf}" in state:
                found.append(([f"{name}.{leaf}" for name in ours], [f"{name}.{leaf}" for name in theirs]))
    return found


def _places(model: Any, layout: Layout) -> list[Pair]:
    """Where every module or tensor lies, and some that a model may not have."""
    pairs = [([ours], [theirs]) for theirs, ours in layout.names.items()]
    for leaf in ("weight", "bias"):
        pairs.append(([f"attn_pool.q.{leaf}", f"attn_pool.kv.{leaf}"], [f"head.attention.in_proj_{leaf}"]))
    for stage in range(len(getattr(model.config, "depths", ())) - 1):  # timm merges patches where a stage begins
        for part in ("norm", "reduction"):
            there = f"swin.encoder.layers.{stage}.downsample.{part}"
            pairs.append(([f"layers.{stage + 1}.downsample.{part}"], [there]))
    for ours, block in blocks_of(model, layout):
        theirs = layout.block.format(*re.findall(r"\d+", ours))
        pairs += [([f"{ours}.{inner}"], [f"{theirs}.{name}"]) for name, inner in layout.inside.items()]
        attention = f"{theirs}.{layout.attention}"
        if isinstance(block.get_submodule(layout.attention), Constant):
            pairs.append(([f"{ours}.attn"], [attention]))
        else:
            pairs.append(([f"{ours}.attn.qkv"], [f"{attention}.{part}_proj" for part in "qkv"]))
            pairs.append(([f"{ours}.attn.proj"], [f"{attention}.{layout.out}"]))
        if isinstance(block.mlp, Constant):
            pairs.append(([f"{ours}.mlp"], [f"{theirs}.mlp"]))
        else:
            first, last = mlp_layers(block.mlp)
            pairs.append(([f"{ours}.mlp.fc1"], [f"{theirs}.mlp.{name}" for name in first]))
            pairs.append(([f"{ours}.mlp.fc2"], [f"{theirs}.mlp.{last}"]))
    return pairs
