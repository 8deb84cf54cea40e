"""The weights of models of transformers under timm's names, and back. Shapes are those of `layouts`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from stratavit.elastic.plain import Constant
from stratavit.interop.transformers.layouts import Layout


def blocks_of(model: Any, layout: Layout) -> list[tuple[str, Any]]:
    """timm's name and the module of every block, in order of execution."""
    start, _, _ = layout.block.partition(".{}")
    layers = model.get_submodule(start)
    if layout.block.count("{}") == 1:
        return [(f"blocks.{i}", layer) for i, layer in enumerate(layers)]
    return [(f"layers.{s}.blocks.{i}", b) for s, stage in enumerate(layers) for i, b in enumerate(stage.blocks)]


def mlp_layers(mlp: Any) -> tuple[list[Any], Any]:
    """The maps into the hidden units, gate first, and the one out of them."""
    if hasattr(mlp, "gate_proj"):
        return [mlp.gate_proj, mlp.up_proj], mlp.down_proj
    return [mlp.fc1], mlp.fc2


def to_state(model: Any, layout: Layout) -> dict[str, Tensor]:
    """timm's state dict."""
    state = model.state_dict()
    made = {}
    for ours, theirs in _tensors(model, layout):
        tensor = torch.cat([state[name] for name in theirs]) if len(theirs) > 1 else state[theirs[0]]
        for _ in range((layout.flat or {}).get(ours, 0)):
            tensor = tensor.unsqueeze(0)
        made[ours] = tensor
    for stage in range(len(getattr(model.config, "depths", ())) - 1):  # timm merges patches where a stage begins
        for leaf in ("norm.weight", "norm.bias", "reduction.weight"):
            made[f"layers.{stage + 1}.downsample.{leaf}"] = state[f"swin.encoder.layers.{stage}.downsample.{leaf}"]
    if "head.attention.in_proj_weight" in state:
        for leaf in ("weight", "bias"):
            query, rest = state[f"head.attention.in_proj_{leaf}"].tensor_split([made["norm.weight"].numel()])
            made[f"attn_pool.q.{leaf}"], made[f"attn_pool.kv.{leaf}"] = query, rest
    return made


def frozen_of(model: Any, layout: Layout) -> list[str]:
    """timm's names of the parameters that are frozen there; of stacked ones, if all are."""
    own = dict(model.named_parameters())
    return [
        ours
        for ours, theirs in _all_tensors(model, layout)
        if all(name in own and not own[name].requires_grad for name in theirs)
    ]


def set_frozen_there(model: Any, layout: Layout, frozen: Collection[str]) -> None:
    """Freezes what timm's equivalent has frozen; what is stacked there only if all of it is."""
    own, kept = dict(model.named_parameters()), set()
    for ours, theirs in _all_tensors(model, layout):
        for name in theirs:
            if name in own and ours in frozen and name not in kept:
                own[name].requires_grad_(False)
            elif name in own:
                kept.add(name)
                own[name].requires_grad_(True)


def _all_tensors(model: Any, layout: Layout) -> list[tuple[str, list[str]]]:
    """`_tensors`, and those that are not stacked but lie elsewhere or are split."""
    found = _tensors(model, layout)
    for stage in range(len(getattr(model.config, "depths", ())) - 1):
        for leaf in ("norm.weight", "norm.bias", "reduction.weight"):
            there = f"swin.encoder.layers.{stage}.downsample.{leaf}"
            found.append((f"layers.{stage + 1}.downsample.{leaf}", [there]))
    if hasattr(model, "head"):
        found += [
            (f"attn_pool.{part}.{leaf}", [f"head.attention.in_proj_{leaf}"])
            for leaf in ("weight", "bias")
            for part in ("q", "kv")
        ]
    return found


@torch.no_grad()
def load_state(model: Any, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Fills a model from timm's state dict; what timm has no place for stays as it is built."""
    own = model.state_dict()
    for ours, theirs in _tensors(model, layout):
        parts = state[ours].chunk(len(theirs)) if len(theirs) > 1 else (state[ours],)
        for name, part in zip(theirs, parts, strict=True):
            own[name].copy_(part.reshape(own[name].shape))
    for stage in range(len(getattr(model.config, "depths", ())) - 1):
        for leaf in ("norm.weight", "norm.bias", "reduction.weight"):
            own[f"swin.encoder.layers.{stage}.downsample.{leaf}"].copy_(state[f"layers.{stage + 1}.downsample.{leaf}"])
    if "attn_pool.q.weight" in state:
        for leaf in ("weight", "bias"):
            both = torch.cat([state[f"attn_pool.q.{leaf}"], state[f"attn_pool.kv.{leaf}"]])
            own[f"head.attention.in_proj_{leaf}"].copy_(both)


def _pairs(model: Any, layout: Layout) -> list[tuple[str, list[str]]]:
    """timm's name of every module or tensor, and the names there: several are stacked, in order."""
    pairs = [(ours, [theirs]) for theirs, ours in layout.names.items()]
    by_block = {id(block): name for name, block in model.named_modules()}
    for ours, block in blocks_of(model, layout):
        theirs = by_block[id(block)]
        pairs += [(f"{ours}.{inner}", [f"{theirs}.{name}"]) for name, inner in layout.inside.items()]
        attention, mlp = f"{theirs}.{layout.attention}", f"{theirs}.{layout.mlp}"
        if isinstance(block.get_submodule(layout.attention), Constant):
            pairs.append((f"{ours}.attn", [attention]))
        else:
            pairs.append((f"{ours}.attn.qkv", [f"{attention}.{part}_proj" for part in "qkv"]))
            pairs.append((f"{ours}.attn.proj", [f"{attention}.{layout.out}"]))
        module = block.get_submodule(layout.mlp)
        if isinstance(module, Constant):
            pairs.append((f"{ours}.mlp", [mlp]))
        else:
            first, last = mlp_layers(module)
            names = {id(layer): name for name, layer in module.named_children()}
            pairs.append((f"{ours}.mlp.fc1", [f"{mlp}.{names[id(layer)]}" for layer in first]))
            pairs.append((f"{ours}.mlp.fc2", [f"{mlp}.{names[id(last)]}"]))
    return pairs


def _tensors(model: Any, layout: Layout) -> list[tuple[str, list[str]]]:
    """The same for tensors: modules spelt out."""
    state, found = model.state_dict(), []
    for ours, theirs in _pairs(model, layout):
        if theirs[0] in state:
            found.append((ours, theirs))
        for leaf in ("weight", "bias"):
            if f"{theirs[0]}.{leaf}" in state:
                found.append((f"{ours}.{leaf}", [f"{name}.{leaf}" for name in theirs]))
    return found
