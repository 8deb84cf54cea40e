"""Models of Hugging Face transformers: to timm's equivalent on entry, back to their own class on extraction.

A small model is of the class that it came from; its ``config.stratavit`` names the width of every module that was cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.plain import Constant
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, described, one_line
from stratavit.files.state_dicts import load_weights
from stratavit.interop.equivalence import check_equivalent
from stratavit.interop.transformers.layouts import LAYOUTS, Layout
from stratavit.interop.transformers.weights import (
    blocks_of,
    frozen_of,
    load_state,
    mlp_layers,
    set_frozen_there,
    to_state,
)
from stratavit.models import architecture
from stratavit.models.freezing import frozen_names, set_frozen
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import model_device, model_dtype

KEY = "stratavit"  # of the configuration
OLDEST = (5, 18)  # of transformers; as in pyproject.toml
CARRIED = ("provenance", "data_config", "embedding")  # attributes that a small model keeps, whatever its class


class ConstantAttention(Constant):
    """A `Constant` in the place of an attention module, which answers with attention weights, too."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Tokens ``[B, N, C]`` to the same constant for each, and no attention weights."""
        return super().forward(hidden_states), None


class Absent(nn.Module):
    """A layer without outputs under a stock name.

    transformers' own loader does not know of cut modules and would fill them with random weights; this it refuses.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dim))


def is_transformers(model: Any) -> bool:
    """Whether it is a model of transformers; without importing that library."""
    return type(model).__module__.split(".")[0] == "transformers" and hasattr(model, "config")


def layout_of(model: Any) -> Layout:
    """Where a model keeps its weights.

    Raises:
        UnsupportedModelError: It is of no known class, or has an option that timm does not have.
        StrataViTError: See `library`.
    """
    name = type(model).__name__
    if name not in LAYOUTS:
        raise UnsupportedModelError(
            f"cannot cut a {name} of transformers: expected one of {', '.join(LAYOUTS)}; `stratavit models` lists them"
        )
    library()
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
    if name == "SwinForImageClassification" and config.hidden_act != "gelu":
        raise UnsupportedModelError(
            f"cannot cut this {name}: hidden_act is {described(config.hidden_act)}, timm's gelu"
        )
    if getattr(config, "use_absolute_embeddings", False):
        raise UnsupportedModelError(f"cannot cut this {name}: absolute positions (use_absolute_embeddings)")
    if name == "SiglipVisionModel" and not getattr(config, "vision_use_head", True):
        raise UnsupportedModelError(f"cannot cut this {name}: it does not pool its tokens (vision_use_head is off)")
    try:
        args = layout.arguments(config) | _classes(model)
    except KeyError as error:
        raise UnsupportedModelError(f"cannot cut this {name}: timm has no activation like {one_line(error)}") from error
    name = "vit_giant_patch14_dinov2" if getattr(config, "use_swiglu_ffn", False) else layout.architecture
    sites = {}
    for ours, theirs in blocks_of(model, layout):
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
        UnsupportedModelError: See `describe`; or timm's model answers otherwise.
    """
    layout = layout_of(model)
    description = describe(model)
    made: Any = architecture.build(description)
    load_weights(made, to_state(model, layout), f"{type(model).__name__}", assign=False)
    set_frozen(made, frozen_of(model, layout))
    made.to(dtype=model.dtype, device=model.device)
    channels, size = description["args"]["in_chans"], description["args"]["img_size"]
    made.data_config = {
        "input_size": (channels, *size),
        "interpolation": "bicubic",
        **layout.normal,
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    for attribute in CARRIED:  # of a small model
        if hasattr(model, attribute):
            setattr(made, attribute, getattr(model, attribute))
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key != KEY}
    attention = getattr(model.config, "_attn_implementation", None)
    made.origin = {"library": "transformers", "class": type(model).__name__, "config": config, "attention": attention}
    ready: nn.Module = made.eval()
    check_equivalent(ready, model, (channels, *size))
    return ready


def from_timm(small: Any, origin: Mapping[str, Any]) -> Any:
    """A model of transformers from timm's equivalent, cut or not.

    Args:
        small: What `SuperNet.extract` made.
        origin: See `to_timm`.

    Raises:
        ArtifactError: The origin is none that this library wrote.
    """
    transformers = library()
    name = origin.get("class")
    if name not in LAYOUTS:
        raise ArtifactError(f"origin: expected one of {', '.join(LAYOUTS)}, got {described(name)}")
    layout, kind, small = LAYOUTS[name], getattr(transformers, name), with_plain_head(small)
    state = small.state_dict()
    numbers = architecture.describe(small)["sites"]
    try:
        config = kind.config_class.from_dict(dict(origin["config"]))
        config.stratavit = {"widths": _widths(numbers)}
        if small.num_classes and config.num_labels != small.num_classes:  # a head put there since
            config.num_labels = small.num_classes
        if origin.get("attention") == "eager":
            config._attn_implementation = "eager"
        with initialization().no_init_weights():
            model = kind(config)
            resize(model)
        load_state(model, layout, state)
        set_frozen_there(model, layout, frozen_names(small))
    except Exception as error:  # a configuration from a file can be wrong in any way that transformers does not check
        raise ArtifactError(f"origin: {name} cannot be built: {type(error).__name__}: {one_line(error)}") from error
    for attribute in CARRIED:
        if hasattr(small, attribute):
            setattr(model, attribute, getattr(small, attribute))
    model.to(dtype=model_dtype(small), device=model_device(small))
    return model.eval()


def resize(model: Any) -> None:
    """Gives the modules of a freshly built model the widths that its ``config.stratavit`` names."""
    layout, widths = layout_of(model), getattr(model.config, KEY)["widths"]
    for ours, block in blocks_of(model, layout):
        width, constant = _split(widths[f"{ours}.attn"])
        attention = block.get_submodule(layout.attention)
        out = getattr(attention, layout.out)
        if width == 0:
            gone: Constant = ConstantAttention(out.out_features if constant else 0)
            gone.q_proj = Absent(attention.q_proj.in_features)
            setattr(block, layout.attention, gone)
        else:
            _narrow_attention(attention, layout, width)
        width, constant = _split(widths[f"{ours}.mlp"])
        mlp = block.get_submodule(layout.mlp)
        first, last = mlp_layers(mlp)
        if width == 0:
            gone = Constant(last.out_features if constant else 0)
            name = next(name for name, layer in mlp.named_children() if layer is first[0])
            setattr(gone, name, Absent(first[0].in_features))
            setattr(block, layout.mlp, gone)
        else:
            for name, layer in mlp.named_children():
                if layer in first:
                    setattr(mlp, name, nn.Linear(layer.in_features, width, layer.bias is not None))
                elif layer is last:
                    setattr(mlp, name, nn.Linear(width, layer.out_features))


def initialization() -> Any:
    """The module of transformers that can leave weights as they are when a model is built, to fill them afterwards."""
    from transformers import initialization as module

    return module


def library() -> Any:
    """transformers itself.

    Raises:
        StrataViTError: It is not installed, or names its modules otherwise than our layouts.
    """
    try:
        import transformers
    except ImportError as error:
        raise StrataViTError(
            "models of transformers need that library: pip install 'stratavit[transformers]'"
        ) from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise StrataViTError(
            f"models of transformers need release {OLDEST[0]}.{OLDEST[1]} or newer of it, found "
            f"{transformers.__version__}: pip install 'stratavit[transformers]'"
        )
    return transformers


def _classes(model: Any) -> dict[str, int]:
    """Of the layer itself: ``model.classifier = nn.Linear(...)`` leaves `num_labels` behind."""
    layer = getattr(model, "classifier", None)
    return {"num_classes": layer.out_features} if type(layer) is nn.Linear else {}


def _numbers(attention: Any, layout: Layout) -> dict[str, Any]:
    if isinstance(attention, Constant):
        return {"constant": 0 if attention.bias is None else attention.bias.numel()}
    width = attention.head_dim
    bias, out = attention.q_proj.bias is not None, getattr(attention, layout.out)
    heads = attention.q_proj.out_features // width
    return {"num_heads": heads, "head_dim": width, "qkv_bias": bias, "proj_bias": out.bias is not None}


def _mlp_numbers(mlp: Any) -> dict[str, Any]:
    if isinstance(mlp, Constant):
        return {"constant": 0 if mlp.bias is None else mlp.bias.numel()}
    first, last = mlp_layers(mlp)
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
