"""Folders of Hugging Face transformers: read whatever ``save_pretrained`` wrote, cut or not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from stratavit.architecture import resolve_data_config
from stratavit.errors import ArtifactError, one_line
from stratavit.folders import read_json
from stratavit.hf_layouts import LAYOUTS
from stratavit.hf_models import KEY, from_timm, library, resize, to_timm

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # timm's name -> Pillow's number


def is_folder_of_transformers(path: str | Path) -> bool:
    """Whether a folder holds a model of transformers; timm's ``config.json`` names no ``model_type``."""
    config = Path(path) / CONFIG
    return config.is_file() and "model_type" in read_json(config)


def load_transformers(path: str | Path) -> Any:
    """A small model from the folder that its ``save_pretrained`` wrote.

    Raises:
        ArtifactError: The folder holds no such model.
    """
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    except Exception as error:
        raise ArtifactError(f"{path}: not a model of transformers ({one_line(error)})") from error
    if kind is None or kind.__name__ not in LAYOUTS:
        raise ArtifactError(f"{path}: expected a model of one of {', '.join(LAYOUTS)}, found {config.architectures}")

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        if getattr(config, KEY, None) is not None:
            resize(self)

    sliced: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    try:
        model, found = sliced.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # configuration and weights of a folder can be wrong in any way
        raise ArtifactError(f"{path}: the {kind.__name__} there cannot be loaded: {one_line(error)}") from error
    if found["missing_keys"]:
        raise ArtifactError(f"{path}: the weights lack {min(found['missing_keys'])}; save the model again")
    model.__class__ = kind
    return model.eval()


def save_transformers(model: nn.Module, path: str | Path) -> None:
    """Writes timm's equivalent of a model of transformers as a folder of transformers, its image processor included.

    Args:
        model: With an ``origin``, see `hf_models.to_timm`.
        path: A folder; files in it are replaced.
    """
    transformers = library()
    config = resolve_data_config(model)
    height, width = config["input_size"][1:]
    edge = math.floor(min(height, width) / config["crop_pct"])  # as timm does
    squash = config["crop_mode"] == "squash"
    processor = transformers.CLIPImageProcessor(
        size={"height": height, "width": width} if squash else {"shortest_edge": edge},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample=_RESAMPLING[config["interpolation"]],
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )
    from_timm(model, model.origin).save_pretrained(path)  # type: ignore[arg-type]
    processor.save_pretrained(path)


def load_equivalent(path: str | Path) -> nn.Module:
    """timm's equivalent of the model in a folder of transformers, its images prepared as the processor there says.

    Raises:
        ArtifactError: See `load_transformers`.
        UnsupportedModelError: See `hf_models.to_timm`.
    """
    model: Any = to_timm(load_transformers(path))
    processor = Path(path) / PROCESSOR
    if processor.is_file():
        try:
            model.data_config |= _data_config(read_json(processor), min(model.data_config["input_size"][1:]))
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ArtifactError(f"{processor}: not the settings of an image processor ({error})") from error
    made: nn.Module = model
    return made


def _data_config(found: dict[str, Any], side: int) -> dict[str, Any]:
    """timm's data configuration, as far as a processor tells it."""
    names = {number: name for name, number in _RESAMPLING.items()}
    edge = (found.get("size") or {}).get("shortest_edge")
    config: dict[str, Any] = {
        ours: tuple(float(number) for number in found[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if found.get(theirs)
    }
    if found.get("resample") in names:
        config["interpolation"] = names[found["resample"]]
    if edge:
        share = side / float(edge)
        share = share if math.floor(side / share) == edge else math.nextafter(share, 0)
        return config | {"crop_pct": share, "crop_mode": "center"}
    return config | ({"crop_pct": 1.0, "crop_mode": "squash"} if found.get("size") else {})
