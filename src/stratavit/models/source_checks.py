"""What a model must be before it is cut or saved: plain layers, with weights of their own in plain types.

Anything else is told in one sentence at the door, before work is done that could not be kept.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from stratavit.elastic.base import ElasticSite
from stratavit.errors import StrataViTError, UnsupportedModelError, one_line, out_of_memory
from stratavit.files.state_dicts import FLOATS
from stratavit.models.families import KINDS, family_of
from stratavit.utils.wrappers import held_by

LINEAR = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc1_g", "fc1_x", "fc2")  # of the modules that are cut


def check(model: nn.Module) -> None:
    """All that is looked at before a model is cut or saved.

    Raises:
        UnsupportedModelError: It is of no known family, or see `check_layers` and `check_weights`.
        StrataViTError: See `check_weights`.
    """
    check_layers(model)
    family_of(model).check(model)
    check_weights(model)


def check_layers(model: nn.Module) -> None:
    """Refuses layers that other tools have put in, or put around those of timm.

    Raises:
        UnsupportedModelError: Names the module, what it is and how to be rid of it.
    """
    found = ((name, _foreign(module)) for name, module in model.named_modules())
    inside = ((f"{name}.{leaf}", layer) for name, module in _to_cut(model) for leaf, layer in module.named_children())
    unlike = ((name, _unlike_linear(name, layer)) for name, layer in inside)
    for name, what in (*found, *unlike):
        if what is not None:
            raise UnsupportedModelError(f"cannot take this {type(model).__name__}: {name or 'the model'} {what}")


def check_weights(model: nn.Module) -> None:
    """Refuses weights that are not there, not plain, or not finite.

    Raises:
        UnsupportedModelError: They are of a kind that is not computed with here.
        StrataViTError: They hold NaN or infinite values.
    """
    places = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_storage(name, tensor)
        places.add(tensor.device)
        if isinstance(tensor, nn.Parameter) and (tensor.dtype not in FLOATS or tensor.layout is not torch.strided):
            raise UnsupportedModelError(
                f"weights: {name} is of type {tensor.dtype} ({tensor.layout}), expected dense floating numbers; "
                "give the model as it was before it was quantised or made sparse"
            )
        if tensor.is_floating_point() and not tensor.detach().isfinite().all():
            raise StrataViTError(f"weights: {name} holds NaN or infinite values; give a sound checkpoint")
    if not any(True for _ in model.parameters()):
        raise UnsupportedModelError(
            f"weights: this {type(model).__name__} has none; give the model as it was before it was quantised"
        )
    _check_untied(model)
    if len(places) > 1:
        names = ", ".join(sorted(str(place) for place in places))
        raise UnsupportedModelError(f"weights: they lie on several devices ({names}); move the model to one")


def _check_untied(model: nn.Module) -> None:
    """Refuses one tensor in two places: each place is sorted and cut in its own way."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name:
            raise UnsupportedModelError(
                f"weights: {other} and {name} are one tensor, which cannot be cut in two ways; clone it for one of them"
            )


def _check_storage(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"weights: {name} has no storage (device meta, or offloaded by accelerate); load the weights into memory, "
            "without device_map, first"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UnsupportedModelError(
            f"weights: {name} was made inside torch.inference_mode() and can get no gradient; make the model, or load "
            "its weights, outside of it"
        )
    if type(tensor) not in (nn.Parameter, torch.Tensor):
        raise UnsupportedModelError(
            f"weights: {name} is a {type(tensor).__module__}.{type(tensor).__name__}, expected a plain tensor; "
            "give the model as it was before it was quantised or distributed"
        )


def whole_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without gradients; `memo` as of `copy.deepcopy`.

    Raises:
        UnsupportedModelError: Something that the model holds cannot be copied; its place is named.
    """
    try:
        return _deep_copy(model, memo)
    except Exception as error:  # what was kept there may refuse in any way
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"cannot copy this {type(model).__name__}: {_not_copied(model)} does not allow it "
            f"({type(error).__name__}: {one_line(error)}); delete it, or detach() what was kept of a forward pass"
        ) from error


def _deep_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    with torch.no_grad():
        return copy.deepcopy(value, memo)


def _not_copied(model: nn.Module) -> str:
    """The first thing beside submodules that cannot be copied."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                _deep_copy(None if key == "_modules" else value)
            except Exception:
                return f"{name}.{key}".lstrip(".")
    return "something in it"


def own_routines(module: nn.Module) -> list[str]:
    """Methods of its class that a module has replaced for itself, as ``model.forward = ...`` does."""
    return [key for key in vars(module) if inspect.isroutine(getattr(type(module), key, None))]


def drop_own_routines(model: nn.Module) -> None:
    """Gives every module the methods of its class back: what took their place often still leads to another model."""
    for module in model.modules():
        for key in own_routines(module):
            del module.__dict__[key]


def _foreign(module: Any) -> str | None:
    """What another tool made of a module, and what to do; None if nothing is known of."""
    origin, kind = type(module).__module__, type(module).__name__
    parts = set(module._parameters) | set(module._modules)
    inner = held_by(module)
    if inner is not None:
        return f"is wrapped by {kind}: put its .{inner} in its place"
    if origin.split(".")[0] == "peft" or any(part.startswith("lora_") for part in parts):
        return f"is a {kind} with adapters beside its weights (LoRA): merge them first (peft: model.merge_and_unload())"
    if "parametrizations" in parts:
        return (
            "has a parametrization (weight norm and others): make it permanent by "
            "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
        )
    if any(f"{part}_mask" in module._buffers for part in ("weight", "bias")):
        return "has a pruning mask: make it permanent by torch.nn.utils.prune.remove(module, name)"
    if {"weight_g", "weight_v"} <= parts or "weight_u" in module._buffers:
        return "has weight or spectral norm: make it permanent by torch.nn.utils.remove_weight_norm(module)"
    if "quantized" in origin or origin.split(".")[0] in ("bitsandbytes", "torchao", "optimum"):
        return f"is a quantised {kind} ({origin}): give the model as it was before it was quantised"
    return None


def _to_cut(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in KINDS or isinstance(module, ElasticSite)
    ]


def _unlike_linear(name: str, layer: nn.Module) -> str | None:
    if name.rpartition(".")[2] not in LINEAR or type(layer) is nn.Linear:
        return None
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    return f"is a {kind}, expected torch's Linear layer: merge into one what it adds to it"
