"""Image processors of Hugging Face transformers and timm's data configuration: one to the other, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stratavit.errors import ArtifactError, described, one_line
from stratavit.interop.transformers.models import library

PROCESSOR = "preprocessor_config.json"
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # timm's name -> Pillow's number


def processor_of(config: Mapping[str, Any]) -> Any:
    """A processor of transformers that resizes, crops and normalises as timm does with a data configuration."""
    height, width = config["input_size"][1:]
    edges = [math.floor(side / config["crop_pct"]) for side in (height, width)]  # as timm does
    squash = config["crop_mode"] == "squash"
    return library().CLIPImageProcessor(
        size={"height": edges[0], "width": edges[1]} if squash else {"shortest_edge": min(edges)},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample=_RESAMPLING[config["interpolation"]],
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


def read_processor(folder: str | Path, input_size: tuple[int, int, int], flexible: bool) -> dict[str, Any]:
    """timm's data configuration of the processor in a folder, read by transformers itself.

    Args:
        folder: Of transformers.
        input_size: Channels, height and width that the model was built for.
        flexible: The model takes other sizes, too; the processor's becomes ``input_size``.

    Raises:
        ArtifactError: It cannot be read, or does what timm's preparation of images does not.
    """
    path = Path(folder) / PROCESSOR
    try:
        processor = library().AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        return _config(processor, input_size, flexible)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except Exception as error:  # a file can be wrong in any way that transformers does not check
        raise ArtifactError(f"{path}: not the settings of an image processor ({one_line(error)})") from error


def _config(processor: Any, input_size: tuple[int, int, int], flexible: bool) -> dict[str, Any]:
    channels, *built = input_size
    rescaled = getattr(processor, "do_rescale", True) and math.isclose(processor.rescale_factor, 1 / 255, rel_tol=1e-3)
    if not (processor.do_resize and rescaled):
        raise ArtifactError("expected images that are resized and rescaled by 1/255, as timm prepares them")
    resized = _sides(processor.size)
    made = _sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else resized
    made = built if made is None else made
    if made != built and not flexible:
        height, width = map(described, made)
        raise ArtifactError(f"it makes images of {height} x {width}, the model reads {built[0]} x {built[1]}")
    edge = processor.size.get("shortest_edge") if resized is None else None
    if resized is None and not edge:
        raise ArtifactError("expected a size of height and width, or of the shortest edge")
    shares = (
        {_share(min(made), edge)} if resized is None else {_share(*sides) for sides in zip(made, resized, strict=True)}
    )
    if len(shares) > 1 or max(shares) > 1:
        raise ArtifactError("the crop is not the same part of height and width, or larger than what it is cut from")
    names = {number: name for name, number in _RESAMPLING.items()}
    if int(processor.resample) not in names:
        raise ArtifactError(f"resample {described(processor.resample)} is none of {', '.join(_RESAMPLING)}")
    normal = bool(processor.do_normalize)
    return {
        "input_size": (channels, *made),
        "interpolation": names[int(processor.resample)],
        "mean": tuple(map(float, processor.image_mean)) if normal else (0.0,) * channels,
        "std": tuple(map(float, processor.image_std)) if normal else (1.0,) * channels,
        "crop_pct": shares.pop(),
        "crop_mode": "center" if resized is None else "squash",
    }


def _sides(size: Any) -> list[int] | None:
    """Height and width, if that is what a size says."""
    sides = [size.get("height"), size.get("width")]
    return None if None in sides else [int(side) for side in sides]


def _share(side: int, edge: Any) -> float:
    """The part of an edge that is kept, so that timm finds the edge again: it rounds down."""
    share = side / int(edge)
    return share if math.floor(side / share) == edge else math.nextafter(share, 0)
