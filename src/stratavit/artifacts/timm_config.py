"""``config.json`` in the shape of timm's hub loader.

With it ``timm.create_model("hf-hub:user/name", pretrained=True)`` (or ``local-dir:FOLDER``) loads the weights. Where
timm's own arguments describe the model, this library is not needed: a super-network is such a model at full size. Else,
as for modules with widths of their own, the file names what ``import stratavit`` registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from stratavit.interop.timm_name import FORMAT_VERSION, KEY, NAME
from stratavit.models import architecture
from stratavit.models.families import family_of

FILE = "config.json"


def timm_config(description: Mapping[str, Any], data_config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm needs to build a model and to prepare its images.

    Args:
        description: See `architecture.describe`.
        data_config: See `architecture.resolve_data_config`.
    """
    built: Any = architecture.build(description, device="meta")
    args, cfg = description["args"], getattr(built, "pretrained_cfg", None) or {}
    weights = {
        "num_classes": args["num_classes"],
        "first_conv": cfg.get("first_conv", "patch_embed.proj"),
        "classifier": cfg.get("classifier", "head"),
        "fixed_input_size": "img_size" in args and not args.get("dynamic_img_size", False),
        "custom_load": False,
    }
    images = {key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()}
    return {
        **(stock_config(description, built) or entry_config(description)),
        "num_classes": args["num_classes"],
        "num_features": built.num_features,
        "global_pool": args["global_pool"],
        "pretrained_cfg": images | weights,
    }


def needs_stratavit(config: Mapping[str, Any]) -> bool:
    """Whether timm loads by a `timm_config` only after ``import stratavit``."""
    return bool(config["architecture"] == NAME)


def stock_config(description: Mapping[str, Any], built: nn.Module) -> dict[str, Any] | None:
    """``architecture`` and ``model_args`` in timm's own terms; None where these do not describe the model.

    The number of classes is not among the arguments: timm reads it elsewhere, and transformers passes it, too.

    Args:
        description: See `architecture.describe`.
        built: What `architecture.build` makes of it.
    """
    name, computed = description["architecture"], family_of(built).has_buffers  # which are compared
    for own in ((), ("norm_layer",), ("norm_layer", "act_layer")):  # left to the architecture: it may bring its own eps
        args = {key: value for key, value in description["args"].items() if value is not None and key not in own}
        try:
            said = timm.create_model(name, device="cpu" if computed else "meta", **args)
        except (TypeError, ValueError, AssertionError, RuntimeError):  # an argument that this architecture sets itself
            continue
        if architecture.difference(said, built) is None:
            args.pop("num_classes")
            return {"architecture": name, "model_args": args}
    return None


def entry_config(description: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``config.json`` by which timm calls `timm_entry.create`: ``architecture`` and ``model_args``.

    The number of classes is not among the arguments: timm reads it elsewhere, and transformers passes it, too.

    Args:
        description: See `architecture.describe`.
    """
    args = {key: value for key, value in description["args"].items() if value is not None and key != "num_classes"}
    rest = {key: value for key, value in description.items() if key != "args"}
    return {"architecture": NAME, "model_args": {**args, KEY: {"format_version": FORMAT_VERSION, **rest}}}
