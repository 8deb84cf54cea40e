"""Models of Hugging Face transformers: to timm's equivalent on entry, back to their own class on extraction.

A small model is of the class that it came from; its ``config.stratavit`` names the width of every module that was cut,
and `load_transformers` builds it anew from what ``save_pretrained`` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit import architecture
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError
from stratavit.hf_layouts import LAYOUTS, Layout
from stratavit.plain import Constant
from stratavit.structure import model_device, model_dtype
from stratavit.weights import load_weights

KEY = "stratavit"  # of the configuration


class ConstantAttention(Constant):
    """A `Constant` in the place of an attention module, which answers with attention weights, too."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to the same constant for each, and no attention weights."""
        return super().forward(hidden_states), None


def is_transformers(model: Any) -> bool:
    """Whether it is a model of transformers; without importing that library."""
    return type(model).__module__.split(".")[0] == "transformers" and hasattr(model, "config")


def layout_of(model: Any) -> Layout:
    """Where a model keeps its weights.

    Raises:
        UnsupportedModelError: It is of no known class, or has an option that timm does not have.
    """
    name = type(model).__name__
    if name not in LAYOUTS:
        raise UnsupportedModelError(
            f"cannot cut a {name} of transformers: expected one of {', '.join(LAYOUTS)}; `stratavit models` lists them"
        )
    return LAYOUTS[name]


def describe(model: Any) -> dict[str, Any]:
    """timm's description (`architecture.describe`) of the same model, cut or not.

    Raises:
        UnsupportedModelError: See `layout_of`.
    """
    layout, config = layout_of(model), model.config
    name = type(model).__name__
    if name == "SwinForImageClassification" and abs(config.layer_norm_eps - 1e-5) > 1e-9:
        raise UnsupportedModelError(f"cannot cut this {name}: layer_norm_eps is {config.layer_norm_eps}, timm's 1e-5")
    if getattr(config, "use_absolute_embeddings", False):
        raise UnsupportedModelError(f"cannot cut this {name}: absolute positions (use_absolute_embeddings)")
    if name == "SiglipVisionModel" and not getattr(config, "vision_use_head", True):
        raise UnsupportedModelError(f"cannot cut this {name}: it does not pool its tokens (vision_use_head is off)")
    try:
        args = layout.arguments(config)
    except KeyError as error:
        raise UnsupportedModelError(f"cannot cut this {name}: timm has no activation like {error}") from error
    name = "vit_giant_patch14_dinov2" if getattr(config, "use_swiglu_ffn", False) else layout.architecture
    sites = {}
    for ours, theirs in _blocks(model, layout):
        attention, mlp = theirs.get_submodule(layout.attention), theirs.get_submodule(layout.mlp)
        sites[f"{ours}.attn"] = _numbers(attention, layout)
        sites[f"{ours}.mlp"] = _mlp_numbers(mlp)
    eps = {"norm_eps": float(config.layer_norm_eps)} if "norm_layer" in args else {}
    return {"architecture": name, "args": args, **eps, "sites": sites}


def to_timm(model: Any) -> nn.Module:
    """timm's equivalent of a model, with copies of its weights, in eval mode.

    Its ``data_config`` has the mean and std that weights published under this class expect; its ``origin`` says what it
    came from.

    Raises:
        UnsupportedModelError: See `describe`.
    """
    layout = layout_of(model)
    description = describe(model)
    made: Any = architecture.build(description)
    load_weights(made, _to_state(model, layout), f"{type(model).__name__}", assign=False)
    made.to(dtype=model.dtype, device=model.device)
    channels, size = description["args"]["in_chans"], description["args"]["img_size"]
    made.data_config = {
        "input_size": (channels, *size),
        "interpolation": "bicubic",
        **layout.normal,
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key != KEY}
    made.origin = {"library": "transformers", "class": type(model).__name__, "config": config}
    ready: nn.Module = made.eval()
    return ready


def from_timm(small: Any, origin: Mapping[str, Any]) -> Any:
    """A model of transformers from timm's equivalent, cut or not.

    Args:
        small: What `SuperNet.extract` made.
        origin: See `to_timm`.

    Raises:
        ArtifactError: The origin is none that this library wrote.
    """
    transformers = _library()
    name = origin.get("class")
    if name not in LAYOUTS:
        raise ArtifactError(f"origin: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    layout, kind = LAYOUTS[name], getattr(transformers, name)
    state = small.state_dict()
    numbers = architecture.describe(small)["sites"]
    try:
        config = kind.config_class.from_dict(dict(origin["config"]))
        config.stratavit = {"widths": _widths(numbers)}
        model = kind(config)
        resize(model)
        _load_state(model, layout, state)
    except Exception as error:  # a configuration from a file can be wrong in any way that transformers does not check
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ArtifactError(f"origin: {name} cannot be built: {type(error).__name__}: {reason}") from error
    for attribute in ("provenance", "data_config"):
        setattr(model, attribute, getattr(small, attribute, {}))
    model.to(dtype=model_dtype(small), device=model_device(small))
    return model.eval()


def resize(model: Any) -> None:
    """Gives the modules of a freshly built model the widths that its ``config.stratavit`` names."""
    layout, widths = layout_of(model), getattr(model.config, KEY)["widths"]
    for ours, block in _blocks(model, layout):
        width, constant = _split(widths[f"{ours}.attn"])
        attention = block.get_submodule(layout.attention)
        out = getattr(attention, layout.out)
        if width == 0:
            setattr(block, layout.attention, ConstantAttention(out.out_features if constant else 0))
        else:
            _narrow_attention(attention, layout, width)
        width, constant = _split(widths[f"{ours}.mlp"])
        mlp = block.get_submodule(layout.mlp)
        first, last = _mlp_layers(mlp)
        if width == 0:
            setattr(block, layout.mlp, Constant(last.out_features if constant else 0))
        else:
            for name, layer in mlp.named_children():
                if layer in first:
                    setattr(mlp, name, nn.Linear(layer.in_features, width, layer.bias is not None))
                elif layer is last:
                    setattr(mlp, name, nn.Linear(width, layer.out_features))


def load_transformers(path: str | Path) -> Any:
    """A small model from the folder that its ``save_pretrained`` wrote.

    Raises:
        ArtifactError: The folder holds no such model.
    """
    transformers = _library()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a model of transformers ({str(error).splitlines()[0]})") from error
    if kind is None or kind.__name__ not in LAYOUTS:
        raise ArtifactError(f"{path}: expected a model of one of {', '.join(LAYOUTS)}, found {config.architectures}")
    if getattr(config, KEY, None) is None:
        return kind.from_pretrained(path).eval()

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        resize(self)

    sliced: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    model = sliced.from_pretrained(path)
    model.__class__ = kind
    return model.eval()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise StrataViTError(
            "models of transformers need that library: pip install 'stratavit[transformers]'"
        ) from error
    return transformers


def _blocks(model: Any, layout: Layout) -> list[tuple[str, Any]]:
    """timm's name and the module of every block, in order of execution."""
    start, _, _ = layout.block.partition(".{}")
    layers = model.get_submodule(start)
    if layout.block.count("{}") == 1:
        return [(f"blocks.{i}", layer) for i, layer in enumerate(layers)]
    return [(f"layers.{s}.blocks.{i}", b) for s, stage in enumerate(layers) for i, b in enumerate(stage.blocks)]


def _numbers(attention: Any, layout: Layout) -> dict[str, Any]:
    if isinstance(attention, Constant):
        return {"constant": 0 if attention.bias is None else attention.bias.numel()}
    width = attention.head_dim
    bias, out = attention.q_proj.bias is not None, getattr(attention, layout.out)
    heads = attention.q_proj.out_features // width
    return {"num_heads": heads, "head_dim": width, "qkv_bias": bias, "proj_bias": out.bias is not None}


def _mlp_layers(mlp: Any) -> tuple[list[Any], Any]:
    """The maps into the hidden units, gate first, and the one out of them."""
    if hasattr(mlp, "gate_proj"):
        return [mlp.gate_proj, mlp.up_proj], mlp.down_proj
    return [mlp.fc1], mlp.fc2


def _mlp_numbers(mlp: Any) -> dict[str, Any]:
    if isinstance(mlp, Constant):
        return {"constant": 0 if mlp.bias is None else mlp.bias.numel()}
    first, last = _mlp_layers(mlp)
    bias = first[0].bias is not None
    return {"hidden_features": last.in_features, "fc1_bias": bias, "fc2_bias": last.bias is not None}


def _widths(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Width of every site; ``[0, 1]`` for one that adds a constant, ``[0, 0]`` for one that adds nothing."""
    return {
        name: [0, int(bool(numbers["constant"]))]
        if "constant" in numbers
        else numbers.get("head_dim", numbers.get("hidden_features"))
        for name, numbers in sites.items()
    }


def _split(width: Any) -> tuple[int, bool]:
    return (int(width[0]), bool(width[1])) if isinstance(width, list | tuple) else (int(width), False)


def _narrow_attention(attention: Any, layout: Layout, width: int) -> None:
    heads = attention.q_proj.out_features // attention.head_dim
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        setattr(attention, name, nn.Linear(layer.in_features, heads * width, layer.bias is not None))
    out = getattr(attention, layout.out)
    setattr(attention, layout.out, nn.Linear(heads * width, out.out_features, out.bias is not None))
    attention.head_dim = width
    setattr(attention, layout.scale, width**-0.5)


def _pairs(model: Any, layout: Layout) -> list[tuple[str, list[str]]]:
    """timm's name of every module or tensor, and the names there: several are stacked, in order."""
    pairs = [(ours, [theirs]) for theirs, ours in layout.names.items()]
    by_block = {id(block): name for name, block in model.named_modules()}
    for ours, block in _blocks(model, layout):
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
            first, last = _mlp_layers(module)
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


def _to_state(model: Any, layout: Layout) -> dict[str, Tensor]:
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


@torch.no_grad()
def _load_state(model: Any, layout: Layout, state: Mapping[str, Tensor]) -> None:
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
