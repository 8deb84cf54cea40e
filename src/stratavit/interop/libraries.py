"""Models of other libraries: timm's equivalent on entry, their own class on extraction."""

from __future__ import annotations

from typing import Any

from torch import nn

from stratavit.interop import open_clip_towers, torchvision_vit
from stratavit.interop.transformers import models
from stratavit.models.source_checks import check_layers
from stratavit.utils.wrappers import unwrapped


def as_timm(model: nn.Module) -> nn.Module:
    """timm's equivalent of a model of transformers, torchvision or open_clip, its weights copied; any other as it is.

    Wrappers (DataParallel, torch.compile, an averaged copy) are removed. Outputs are the same up to rounding; of a
    model of transformers they are the logits, or the pooled features where there is no head.

    Args:
        model: Of timm, transformers or torchvision, or an image tower of open_clip; wrapped or not.

    Returns:
        A timm model; the given one if it is one.

    Raises:
        UnsupportedModelError: The model has no equivalent in timm.
    """
    model = unwrapped(model)
    for is_theirs, to_timm in (
        (models.is_transformers, models.to_timm),
        (torchvision_vit.is_torchvision, torchvision_vit.to_timm),
        (open_clip_towers.is_open_clip, open_clip_towers.to_timm),
    ):
        if is_theirs(model):
            check_layers(model)
            return to_timm(model)
    return model


def as_source(small: Any) -> nn.Module:
    """A small model in the class that its source had: of transformers if it came from there, else as it is."""
    origin = getattr(small, "origin", None)
    return models.from_timm(small, origin) if origin else small
