"""The sizes of cut modules, kept with a host: in the configuration of transformers, or as an attribute of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stratavit.interop.part_sites import resize
from stratavit.interop.transformers.models import KEY

ATTRIBUTE = "stratavit_sizes"


def part_sizes(model: nn.Module) -> dict[str, Any]:
    """The sizes of the modules that were cut in a model.

    Args:
        model: A host whose part was cut, by `PartNet.place`; or a small part by `PartNet.extract`.

    Returns:
        Name of a module -> plain numbers, ready for JSON; empty if nothing was cut.
    """
    config = getattr(model, "config", None)
    if config is None:
        return dict(getattr(model, ATTRIBUTE, {}))
    return dict((getattr(config, KEY, None) or {}).get("modules", {}))


def resize_parts(model: nn.Module, sizes: Mapping[str, Any]) -> nn.Module:
    """Makes a freshly built host ready to load the weights of one whose part was cut.

    Args:
        model: Built as the host was, with weights of any kind; changed in place.
        sizes: Of `part_sizes`, for example from a file.

    Returns:
        The model, its cut modules of those sizes, untrained.

    Raises:
        ArtifactError: It has no such modules, or they cannot have such sizes.
    """
    resize(model, sizes)
    _set(model, dict(sizes))
    return model


def state_sizes(model: nn.Module, part: str, sizes: Mapping[str, Any]) -> None:
    """Keeps the sizes of a part's modules with its host, in place of earlier ones of the same part."""
    start = f"{part}." if part else ""
    rest = {name: one for name, one in part_sizes(model).items() if not name.startswith(start)}
    _set(model, rest | {start + name: numbers for name, numbers in sizes.items()})


def forget_sizes(model: nn.Module, part: str) -> None:
    """Drops what `state_sizes` kept of a part."""
    state_sizes(model, part, {})


def _set(model: Any, sizes: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    if config is None:
        setattr(model, ATTRIBUTE, sizes)
    elif sizes:
        setattr(config, KEY, {"modules": sizes})
    elif hasattr(config, KEY):
        delattr(config, KEY)
