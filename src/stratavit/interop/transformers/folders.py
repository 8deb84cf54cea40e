"""Folders of Hugging Face transformers: what ``save_pretrained`` wrote of models, cut or not, and image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stratavit.errors import ArtifactError, described, one_line, shown
from stratavit.files.folders import read_json, read_shapes
from stratavit.files.state_dicts import align_weights
from stratavit.interop.transformers.layouts import LAYOUTS
from stratavit.interop.transformers.models import KEY, from_timm, library, resize, to_timm
from stratavit.models.architecture import resolve_data_config
from stratavit.models.size_checks import check_config

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic")  # timm's names, by Pillow's numbers


def is_folder_of_transformers(path: str | Path) -> bool:
    """Whether a folder holds a model of transformers; timm's ``config.json`` names no ``model_type``."""
    config = Path(path) / CONFIG
    return config.is_file() and "model_type" in read_json(config)


def load_transformers(path: str | Path) -> Any:
    """A small model, or one with a small part, from the folder that its ``save_pretrained`` wrote.

    Args:
        path: The folder.

    Returns:
        A model of its class in transformers, in eval mode.

    Raises:
        ArtifactError: The folder holds no such model.
    """
    transformers, folder = library(), Path(path)
    weights = folder / "model.safetensors"
    if weights.is_file():
        check_config(read_json(folder / CONFIG), read_shapes(weights), str(folder / CONFIG))
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    except Exception as error:
        raise ArtifactError(f"{path}: not a model of transformers ({one_line(error)})") from error
    modules = _modules(config)
    if kind is None or (kind.__name__ not in LAYOUTS and not modules):
        raise ArtifactError(
            f"{path}: expected a model of one of {', '.join(LAYOUTS)}, found {described(config.architectures)}"
        )

    from stratavit.interop.part_sites import resize as resize_modules  # a later room of this package

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        if modules:
            resize_modules(self, modules)
        elif getattr(config, KEY, None) is not None:
            resize(self)

    sliced: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    try:
        model, found = sliced.from_pretrained(path, output_loading_info=True)
    except Exception as error:  # configuration and weights of a folder can be wrong in any way
        raise ArtifactError(f"{path}: the {kind.__name__} there cannot be loaded: {one_line(error)}") from error
    if found["missing_keys"]:
        raise ArtifactError(f"{path}: the weights lack {shown(min(found['missing_keys']))}; save the model again")
    model.__class__ = kind
    align_weights(model)
    return model.eval()


def _modules(config: Any) -> Any:
    """Sizes of single modules in a configuration, see `part_sites.resize`; nothing if it has none."""
    stated = getattr(config, KEY, None)
    return stated.get("modules") if isinstance(stated, Mapping) else None


def save_transformers(model: Any, path: str | Path) -> None:
    """Writes timm's equivalent of a model of transformers as a folder of that library, its image processor included.

    Files in the folder are replaced; the model has an ``origin``, see `models.to_timm`.
    """
    from_timm(model, model.origin).save_pretrained(path)
    processor_of(resolve_data_config(model)).save_pretrained(path)


def load_equivalent(path: str | Path) -> nn.Module:
    """timm's equivalent of the model in a folder of transformers, its images prepared as the processor there says.

    Raises:
        ArtifactError: See `load_transformers`; or the processor does what timm's preparation of images does not.
        UnsupportedModelError: See `models.to_timm`.
    """
    model: Any = to_timm(load_transformers(path))
    if (Path(path) / PROCESSOR).is_file():
        flexible = bool(getattr(model, "dynamic_img_size", False))
        model.data_config |= read_processor(path, model.data_config["input_size"], flexible)
    return model


def processor_of(config: Mapping[str, Any]) -> Any:
    """A processor of transformers that resizes, crops and normalises as timm does with a data configuration."""
    height, width = config["input_size"][1:]
    edges = [math.floor(side / config["crop_pct"]) for side in (height, width)]  # as timm does
    squash = config["crop_mode"] == "squash"
    return library().CLIPImageProcessor(
        size={"height": edges[0], "width": edges[1]} if squash else {"shortest_edge": min(edges)},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample=_RESAMPLING.index(config["interpolation"]),
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


def read_processor(folder: str | Path, input_size: tuple[int, int, int], flexible: bool) -> dict[str, Any]:
    """timm's data configuration of the processor in a folder, read by transformers itself.

    Its size becomes ``input_size`` where the model is `flexible`; else it must be the one that the model was built for.

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
    made = (_sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else resized) or built
    if made != built and not flexible:
        height, width = map(described, made)
        raise ArtifactError(f"it makes images of {height} x {width}, the model reads {built[0]} x {built[1]}")
    if resized is not None:
        shares = {_share(*sides) for sides in zip(made, resized, strict=True)}
    elif edge := processor.size.get("shortest_edge"):
        shares = {_share(min(made), edge)}
    else:
        raise ArtifactError("expected a size of height and width, or of the shortest edge")
    if len(shares) > 1 or max(shares) > 1:
        raise ArtifactError("the crop is not the same part of height and width, or larger than what it is cut from")
    resample = int(processor.resample)
    if not 0 <= resample < len(_RESAMPLING):
        raise ArtifactError(f"resample: expected one of {', '.join(_RESAMPLING)}, got {described(processor.resample)}")
    normal = bool(processor.do_normalize)
    return {
        "input_size": (channels, *made),
        "interpolation": _RESAMPLING[resample],
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
