"""Objects that hold a model and compute what it does: removed, so that the model inside is what is looked at."""

from __future__ import annotations

from typing import Any

from torch import nn

from stratavit.errors import UnsupportedModelError

WRAPPERS = {  # class of torch or timm -> attribute that holds the model
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # what torch.compile returns
    "AveragedModel": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}


def held_by(module: Any) -> str | None:
    """Attribute in which a wrapper of torch or timm holds its model; None if it is not such a wrapper."""
    for kind in type(module).__mro__:
        if kind.__name__ in WRAPPERS and kind.__module__.split(".")[0] in ("torch", "timm"):
            return WRAPPERS[kind.__name__]
    return None


def unwrapped(model: Any) -> Any:
    """The model inside of DataParallel, torch.compile, an averaged copy and their like; any other model as it is.

    Raises:
        UnsupportedModelError: The wrapper has hooks, which the model inside does not have.
    """
    while (name := held_by(model)) is not None:
        if has_hooks(model):
            raise UnsupportedModelError(
                f"cannot take a {type(model).__name__} with hooks of its own: pass the model inside, model.{name}"
            )
        model = getattr(model, name)
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
