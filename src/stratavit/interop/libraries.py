"""Models of other libraries: timm's equivalent on entry, their own class on extraction."""

from __future__ import annotations

from typing import Any

from torch import nn

from stratavit.interop import torchvision_vit
from stratavit.interop.transformers import models
from stratavit.models.source_checks import check_layers
from stratavit.utils.wrappers import unwrapped


def as_timm(model: nn.Module) -> nn.Module:
    """timm's equivalent of a model of transformers or torchvision, its weights copied; any other model as it is.

    Wrappers (DataParallel, torch.compile, an averaged copy) are removed. Outputs are the same up to rounding; of a
    model of transformers they are the logits, or the pooled features where there is no head.

    Args:
        model: Of timm, transformers or torchvision, wrapped or not.

    Returns:
        A timm model; the given one if it is one.

    Raises:
        UnsupportedModelError: The model has no equivalent in timm.
    """
    model = unwrapped(model)
    theirs, library = models.is_transformers(model), torchvision_vit.is_torchvision(model)
    if theirs or library:
        check_layers(model)
        return models.to_timm(model) if theirs else torchvision_vit.to_timm(model)
    return model


def as_source(small: Any) -> nn.Module:
    """A small model in the class that its source had: of transformers if it came from there, else as it is."""
    origin = getattr(small, "origin", None)
    return models.from_timm(small, origin) if origin else small
