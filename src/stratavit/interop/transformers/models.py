"""Models of Hugging Face transformers: to timm's equivalent on entry, back to their own class on extraction.

A small model is of the class that it came from; its ``config.stratavit`` names the width of every module that was cut,
and where transformers' own terms say the same (`stated_widths`), they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.plain import Constant
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, described, one_line
from stratavit.interop.timm_equivalent import fill_equivalent
from stratavit.interop.transformers.layouts import LAYOUTS, Layout
from stratavit.interop.transformers.stated_widths import state_widths
from stratavit.interop.transformers.weights import (
    blocks_of,
    frozen_of,
    load_state,
    mlp_layers,
    set_frozen_there,
    to_state,
)
from stratavit.models import architecture
from stratavit.models.freezing import frozen_names
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import model_device, model_dtype

KEY = "stratavit"  # of the configuration
OLDEST = (5, 18)  # of transformers; as in pyproject.toml
CARRIED = ("provenance", "data_config", "embedding")  # attributes that a small model keeps, whatever its class


class ConstantAttention(Constant):
    """A `Constant` in the place of an attention module, which returns attention weights, too."""

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
        UnsupportedModelError: It is of no known class.
        StrataViTError: See `library`.
    """
    name = type(model).__name__
    if name not in LAYOUTS:
        raise UnsupportedModelError(
            f"cannot cut a {name} of transformers: expected one of {', '.join(LAYOUTS)}; of other classes, "
            "and of what is part of a larger model, stratavit.convert_part makes a super-network in place"
        )
    library()
    return LAYOUTS[name]


def describe(model: Any) -> dict[str, Any]:
    """timm's description (`architecture.describe`) of the same model, cut or not.

    Raises:
        UnsupportedModelError: See `layout_of`; or it has an option that timm does not have.
    """
    layout, config, name = layout_of(model), model.config, type(model).__name__
    swin = name == "SwinForImageClassification"
    for missing, reason in (
        (swin and abs(config.layer_norm_eps - 1e-5) > 1e-9, f"layer_norm_eps is {config.layer_norm_eps}, timm's 1e-5"),
        (swin and config.hidden_act != "gelu", f"hidden_act is {described(config.hidden_act)}, timm's gelu"),
        (getattr(config, "use_absolute_embeddings", False), "absolute positions (use_absolute_embeddings)"),
        (not getattr(config, "vision_use_head", True), "it does not pool its tokens (vision_use_head is off)"),
    ):
        if missing:
            raise UnsupportedModelError(f"cannot cut this {name}: {reason}")
    try:
        args = layout.arguments(config)
    except KeyError as error:
        raise UnsupportedModelError(f"cannot cut this {name}: timm has no activation like {one_line(error)}") from error
    head = getattr(model, "classifier", None)
    if type(head) is nn.Linear:  # ``model.classifier = nn.Linear(...)`` leaves `num_labels` behind
        args["num_classes"] = head.out_features
    sites = {}
    for ours, block in blocks_of(model, layout):
        sites[f"{ours}.attn"] = _numbers(block.get_submodule(layout.attention), layout)
        sites[f"{ours}.mlp"] = _numbers(block.mlp, layout)
    swiglu = getattr(config, "use_swiglu_ffn", False)
    eps = {"norm_eps": float(config.layer_norm_eps)} if "norm_layer" in args else {}
    name = "vit_giant_patch14_dinov2" if swiglu else layout.architecture
    return {"architecture": name, "args": args, **eps, "sites": sites}


def to_timm(model: Any) -> nn.Module:
    """timm's equivalent of a model, with copies of its weights, in eval mode.

    Its ``data_config`` has the mean and std that weights published under this class expect; its ``origin`` says what it
    came from.

    Raises:
        UnsupportedModelError: See `describe`; or the outputs of timm's model differ.
    """
    layout, description = layout_of(model), describe(model)
    size = (description["args"]["in_chans"], *description["args"]["img_size"])
    data_config: dict[str, Any] = {"input_size": size, "interpolation": "bicubic", **layout.normal}
    data_config |= {"crop_pct": 0.9, "crop_mode": "center"}
    built = architecture.build(description)
    made: Any = fill_equivalent(built, model, to_state(model, layout), frozen_of(model, layout), data_config)
    for attribute in CARRIED:  # of a small model
        if hasattr(model, attribute):
            setattr(made, attribute, getattr(model, attribute))
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key != KEY}
    attention = getattr(model.config, "_attn_implementation", None)
    name = type(model).__name__
    made.origin = {"library": "transformers", "class": name, "config": config, "attention": attention}
    return made


def from_timm(small: Any, origin: Mapping[str, Any]) -> Any:
    """A model of transformers from timm's equivalent, cut or not, and its `origin` (see `to_timm`).

    Raises:
        ArtifactError: The origin is not one that this library wrote.
    """
    transformers, name = library(), origin.get("class")
    from transformers import initialization

    if name not in LAYOUTS:
        raise ArtifactError(f"origin: expected one of {', '.join(LAYOUTS)}, got {described(name)}")
    layout, kind, small = LAYOUTS[name], getattr(transformers, name), with_plain_head(small)
    try:
        config = kind.config_class.from_dict(dict(origin["config"]))
        config.stratavit = {"widths": _widths(architecture.describe(small)["sites"])}
        if small.num_classes and config.num_labels != small.num_classes:  # a head put there since
            config.num_labels = small.num_classes
        if origin.get("attention") == "eager":
            config._attn_implementation = "eager"
        with initialization.no_init_weights():
            model = kind(config)
            resize(model)
            state_widths(model, layout)
        load_state(model.to(model_device(small)), layout, small.state_dict())
        set_frozen_there(model, layout, frozen_names(small))
    except Exception as error:  # a configuration from a file can be wrong in any way that transformers does not check
        raise ArtifactError(f"origin: {name} cannot be built: {type(error).__name__}: {one_line(error)}") from error
    for attribute in CARRIED:
        if hasattr(small, attribute):
            setattr(model, attribute, getattr(small, attribute))
    return model.to(model_dtype(small)).eval()


def resize(model: Any) -> None:
    """Puts layers of the widths that its ``config.stratavit`` names into a freshly built model."""
    layout, widths = layout_of(model), getattr(model.config, KEY)["widths"]
    for ours, block in blocks_of(model, layout):
        width, constant = _split(widths[f"{ours}.attn"])
        attention = block.get_submodule(layout.attention)
        if width == 0:
            gone: Constant = ConstantAttention(getattr(attention, layout.out).out_features if constant else 0)
            gone.q_proj = Absent(attention.q_proj.in_features)
            setattr(block, layout.attention, gone)
        else:
            heads = attention.q_proj.out_features // attention.head_dim
            for name in ("q_proj", "k_proj", "v_proj"):
                _replace(attention, name, outputs=heads * width)
            _replace(attention, layout.out, inputs=heads * width)
            attention.head_dim = width
            setattr(attention, layout.scale, width**-0.5)
        width, constant = _split(widths[f"{ours}.mlp"])
        first, last = mlp_layers(block.mlp)
        if width == 0:
            gone = Constant(getattr(block.mlp, last).out_features if constant else 0)
            setattr(gone, first[0], Absent(getattr(block.mlp, first[0]).in_features))
            block.mlp = gone
        else:
            for name in first:
                _replace(block.mlp, name, outputs=width)
            _replace(block.mlp, last, inputs=width)


def library() -> Any:
    """transformers itself.

    Raises:
        StrataViTError: It is not installed, or its modules have other names than our layouts.
    """
    install = "pip install 'stratavit[transformers]'"
    try:
        import transformers
    except ImportError as error:
        raise StrataViTError(f"models of transformers need that library: {install}") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        bound = ".".join(map(str, OLDEST))
        raise StrataViTError(
            f"models of transformers need release {bound} or newer of it, found {transformers.__version__}: {install}"
        )
    return transformers


def _numbers(module: Any, layout: Layout) -> dict[str, Any]:
    """Sizes and biases of an attention or an MLP, as `architecture.describe` names them."""
    if isinstance(module, Constant):
        return {"constant": 0 if module.bias is None else module.bias.numel()}
    if hasattr(module, "q_proj"):
        heads, bias = module.q_proj.out_features // module.head_dim, module.q_proj.bias is not None
        out = getattr(module, layout.out).bias is not None
        return {"num_heads": heads, "head_dim": module.head_dim, "qkv_bias": bias, "proj_bias": out}
    names, name = mlp_layers(module)
    first, last = getattr(module, names[0]).bias, getattr(module, name)
    return {"hidden_features": last.in_features, "fc1_bias": first is not None, "fc2_bias": last.bias is not None}


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


def _replace(owner: nn.Module, name: str, inputs: int | None = None, outputs: int | None = None) -> None:
    """Puts a linear layer of another size in the place of one."""
    old: Any = getattr(owner, name)
    sizes = (old.in_features if inputs is None else inputs, old.out_features if outputs is None else outputs)
    setattr(owner, name, nn.Linear(*sizes, old.bias is not None))
