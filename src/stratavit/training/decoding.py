"""What workers do where images are augmented on the training device: decode, and bring to one size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.data import create_transform

CROP_SHARE = 0.875  # of a decoded image's side that the model's size is, where its configuration does not say


def decoding_transform(data_config: Mapping[str, Any]) -> Any:
    """timm's evaluation transform up to a crop of the middle larger than the model's images: uint8 ``[C, S, S]``."""
    channels, *sides = data_config["input_size"]
    share = data_config.get("crop_pct") or CROP_SHARE
    larger = (channels, *(math.ceil(side / share) for side in sides))
    options = {key: data_config[key] for key in ("interpolation",) if key in data_config}
    return create_transform(larger, is_training=False, crop_pct=1.0, normalize=False, **options)
