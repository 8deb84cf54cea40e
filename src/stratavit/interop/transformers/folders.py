"""Folders of Hugging Face transformers: read whatever ``save_pretrained`` wrote, cut or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stratavit.errors import ArtifactError, described, one_line, shown
from stratavit.files.folders import read_json, read_shapes
from stratavit.interop.transformers.layouts import LAYOUTS
from stratavit.interop.transformers.models import KEY, from_timm, library, resize, to_timm
from stratavit.interop.transformers.processors import PROCESSOR, processor_of, read_processor
from stratavit.models.architecture import resolve_data_config
from stratavit.models.size_checks import check_config

CONFIG = "config.json"


def is_folder_of_transformers(path: str | Path) -> bool:
    """Whether a folder holds a model of transformers; timm's ``config.json`` names no ``model_type``."""
    config = Path(path) / CONFIG
    return config.is_file() and "model_type" in read_json(config)


def load_transformers(path: str | Path) -> Any:
    """A small model from the folder that its ``save_pretrained`` wrote.

    Args:
        path: The folder.

    Returns:
        A model of its class in transformers, in eval mode.

    Raises:
        ArtifactError: The folder holds no such model.
    """
    transformers = library()
    weights = Path(path) / "model.safetensors"
    if weights.is_file():
        check_config(read_json(Path(path) / CONFIG), read_shapes(weights), str(Path(path) / CONFIG))
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    except Exception as error:
        raise ArtifactError(f"{path}: not a model of transformers ({one_line(error)})") from error
    if kind is None or kind.__name__ not in LAYOUTS:
        raise ArtifactError(
            f"{path}: expected a model of one of {', '.join(LAYOUTS)}, found {described(config.architectures)}"
        )

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
        raise ArtifactError(f"{path}: the weights lack {shown(min(found['missing_keys']))}; save the model again")
    model.__class__ = kind
    return model.eval()


def save_transformers(model: nn.Module, path: str | Path) -> None:
    """Writes timm's equivalent of a model of transformers as a folder of transformers, its image processor included.

    Args:
        model: With an ``origin``, see `models.to_timm`.
        path: A folder; files in it are replaced.
    """
    from_timm(model, model.origin).save_pretrained(path)  # type: ignore[arg-type]
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
    made: nn.Module = model
    return made
