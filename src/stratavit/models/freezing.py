"""Weights that their owner has frozen (``requires_grad_(False)``) stay frozen in small models and files.

A tensor that was cut is frozen if the one that it was cut from is; a bias that only the small model has follows the
weight of its layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stratavit.errors import ArtifactError, shown

_CUT_FROM = {  # of the layers of a site, where the small one has another name; the first that is there
    "q.weight": ("q_proj.weight", "qkv.weight"),
    "k.weight": ("k_proj.weight", "qkv.weight"),
    "v.weight": ("v_proj.weight", "qkv.weight"),
    "q.bias": ("q_proj.bias", "qkv.bias", "q_bias"),
    "k.bias": ("k_proj.bias", "qkv.bias", "q_bias"),
    "v.bias": ("v_proj.bias", "qkv.bias", "v_bias"),
    "bias": ("proj.bias", "fc2.bias", "proj.weight", "fc2.weight"),  # of a constant
    "proj.bias": ("proj.weight",),
    "fc2.bias": ("fc2.weight",),
}


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters that need no gradient."""
    return sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def set_frozen(model: nn.Module, names: Iterable[str], source: str = "frozen") -> None:
    """Freezes the parameters of these names, and no others.

    Raises:
        ArtifactError: The model has no such parameter.
    """
    known, frozen = dict(model.named_parameters()), set(names)
    for name in sorted(frozen - known.keys()):
        raise ArtifactError(f"{source}: {shown(name)} is not a parameter of the model; save the model again")
    for name, parameter in known.items():
        parameter.requires_grad_(name not in frozen)


def freeze_like(layer: nn.Module, elastic: nn.Module) -> None:
    """Freezes what was cut out of an elastic module as its own parameters are."""
    own = dict(elastic.named_parameters())
    for name, parameter in layer.named_parameters():
        origin = next((own[key] for key in (name, *_CUT_FROM.get(name, ())) if key in own), None)
        parameter.requires_grad_(origin is None or origin.requires_grad)
