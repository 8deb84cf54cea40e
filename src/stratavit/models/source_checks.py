"""What a model must be before it is cut or saved: plain layers, with weights of their own in plain types.

Anything else is refused in one sentence, before work is done that could not be kept.
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
    """All that is checked before a model is cut or saved.

    Raises:
        UnsupportedModelError: It is not of a known family, or see `check_layers` and `check_weights`.
        StrataViTError: See `check_weights`.
    """
    check_layers(model)
    family_of(model).check(model)
    check_weights(model)


def check_layers(model: nn.Module) -> None:
    """Refuses layers that other tools have put in, or put around those of timm.

    Raises:
        UnsupportedModelError: Names the module, what it is and what to do about it.
    """
    faults = [(name, _foreign(module)) for name, module in model.named_modules()]
    for name, module in model.named_modules():
        if type(module) in KINDS or isinstance(module, ElasticSite):
            faults += [
                (f"{name}.{key}", f"is a {_class(layer)}, expected torch's Linear: merge into one layer what it adds")
                for key, layer in module.named_children()
                if key in LINEAR and type(layer) is not nn.Linear
            ]
    for name, fault in faults:
        if fault is not None:
            raise UnsupportedModelError(f"cannot use this {type(model).__name__}: {name or 'the model'} {fault}")


def _foreign(module: Any) -> str | None:
    """What another tool made of a module, and what to do; None if nothing is known."""
    parts = {*module._parameters, *module._modules, *module._buffers}
    kind, origin = type(module).__name__, type(module).__module__
    root, inner = origin.split(".")[0], held_by(module)
    if inner is not None:
        return f"is wrapped by {kind}: put its .{inner} in its place"
    if root == "peft" or any(part.startswith("lora_") for part in parts):
        return f"is a {kind} with adapters (LoRA): merge them first (peft: model.merge_and_unload())"
    if "parametrizations" in parts:
        return "has a parametrization: make it permanent by torch.nn.utils.parametrize.remove_parametrizations"
    if parts & {"weight_mask", "bias_mask"}:
        return "has a pruning mask: make it permanent by torch.nn.utils.prune.remove(module, name)"
    if {"weight_g", "weight_v"} <= parts or "weight_u" in parts:
        return "has weight or spectral norm: make it permanent by torch.nn.utils.remove_weight_norm(module)"
    if "quantized" in origin or root in ("bitsandbytes", "torchao", "optimum"):
        return f"is a quantised {kind} ({origin}): give the model as it was before it was quantised"
    return None


def check_not_recomputed(model: nn.Module) -> None:
    """Refuses to differentiate a sub-network while gradient checkpointing is on.

    Raises:
        StrataViTError: Some block would be recomputed in the backward pass, when the widths are gone.
    """
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise StrataViTError(
            "gradient checkpointing runs blocks once more in the backward pass, at full width; call "
            "model.set_grad_checkpointing(False) to train sub-networks, or run them under torch.no_grad()"
        )


def check_weights(model: nn.Module) -> None:
    """Refuses weights that are not there, not plain, shared, or not finite.

    Raises:
        UnsupportedModelError: They are of a kind that cannot be computed with here.
        StrataViTError: They hold NaN or infinite values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers())
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        _check_storage(name, tensor)
        if tensor.is_floating_point() and not tensor.detach().isfinite().all():
            raise StrataViTError(f"weights: {name} holds NaN or infinite values; give a sound checkpoint")
        if name in parameters and first.setdefault(id(tensor), name) != name:
            raise UnsupportedModelError(
                f"weights: {first[id(tensor)]} and {name} are one tensor, which cannot be cut in two ways; clone it "
                "for one of them"
            )
    if not parameters:
        raise UnsupportedModelError(
            f"weights: this {type(model).__name__} has none; give the model as it was before it was quantised"
        )
    places = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(places) > 1:
        raise UnsupportedModelError(f"weights: several devices ({', '.join(places)}); move the model to one of them")


def _check_storage(name: str, tensor: torch.Tensor) -> None:
    fault = None
    if tensor.is_meta:
        fault = "has no storage (device meta, or offloaded); load the weights into memory, without device_map, first"
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        fault = "was made inside torch.inference_mode() and cannot have a gradient; load the weights outside of it"
    elif type(tensor) not in (nn.Parameter, torch.Tensor):
        fault = f"is a {_class(tensor)}, expected a plain tensor; undo quantisation or distribution first"
    elif isinstance(tensor, nn.Parameter) and (tensor.dtype not in FLOATS or tensor.layout is not torch.strided):
        kind = f"{tensor.dtype} ({tensor.layout})"
        fault = f"is of type {kind}, expected dense floating numbers; give the model as it was before it was quantised"
    if fault is not None:
        raise UnsupportedModelError(f"weights: {name} {fault}")


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def whole_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without gradients; `memo` as of `copy.deepcopy`.

    Raises:
        UnsupportedModelError: Something that the model holds cannot be copied; its place is named.
    """
    try:
        with torch.no_grad():
            return copy.deepcopy(model, memo)
    except Exception as error:  # what was kept there may refuse in any way
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"cannot copy this {type(model).__name__}: {_not_copied(model)} does not allow it "
            f"({type(error).__name__}: {one_line(error)}); delete it, or detach() what was kept of a forward pass"
        ) from error


@torch.no_grad()
def _not_copied(model: nn.Module) -> str:
    """The first attribute that cannot be copied."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                copy.deepcopy(None if key == "_modules" else value)
            except Exception:
                return f"{name}.{key}".lstrip(".")
    return "something in it"


def own_routines(module: nn.Module) -> list[str]:
    """Methods of its class that a module has replaced for itself, as ``model.forward = ...`` does."""
    kind = type(module)
    return [key for key in vars(module) if hasattr(kind, key) and inspect.isroutine(getattr(kind, key))]


def drop_own_routines(model: nn.Module) -> None:
    """Restores the methods of the class in every module: what took their place often still leads to another model."""
    for module in model.modules():
        for key in own_routines(module):
            del module.__dict__[key]
