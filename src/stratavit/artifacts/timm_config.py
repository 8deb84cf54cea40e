"""``config.json`` in the shape of timm's hub loader, for models that timm can build from a name and plain arguments.

With it ``timm.create_model("hf-hub:user/name", pretrained=True)`` (or ``local-dir:FOLDER``) loads the weights without
this library. A super-network is such a model at full size; a sub-network whose modules have widths of their own is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm

from stratavit.models import architecture
from stratavit.models.families import family_of

FILE = "config.json"


def timm_config(description: Mapping[str, Any], data_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What timm needs to build a model and to prepare its images; None where timm's terms do not say it.

    Args:
        description: See `architecture.describe`.
        data_config: See `architecture.resolve_data_config`.
    """
    name, built = description["architecture"], architecture.build(description, device="meta")
    computed = family_of(built).has_buffers  # and they are compared
    for own in ((), ("norm_layer",), ("norm_layer", "act_layer")):  # left to the architecture: it may bring its own eps
        args = {key: value for key, value in description["args"].items() if value is not None and key not in own}
        try:
            said = timm.create_model(name, device="cpu" if computed else "meta", **args)
        except (TypeError, ValueError, AssertionError, RuntimeError):  # an argument that this architecture sets itself
            continue
        if architecture.difference(said, built) is None:
            break
    else:
        return None
    images = {key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()}
    weights = {
        "num_classes": args["num_classes"],
        "first_conv": said.pretrained_cfg.get("first_conv", "patch_embed.proj"),
        "classifier": said.pretrained_cfg.get("classifier", "head"),
        "fixed_input_size": not args.get("dynamic_img_size", False),
        "custom_load": False,
    }
    return {
        "architecture": name,
        "num_classes": args["num_classes"],
        "num_features": said.num_features,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": images | weights,
    }
