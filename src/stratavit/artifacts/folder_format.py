"""The format of folders: names of files, the JSON file's parts, and the model that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stratavit.artifacts import timm_config
from stratavit.data.class_names import class_names_of
from stratavit.errors import ArtifactError, described
from stratavit.files import checksums
from stratavit.files.folders import read_json, read_shapes, read_tensors, write_folder, write_json
from stratavit.files.state_dicts import check_one_type, load_weights
from stratavit.interop.transformers.layouts import LAYOUTS
from stratavit.models import architecture, size_checks
from stratavit.models.freezing import set_frozen
from stratavit.version import __version__

FORMAT_VERSION = 1
JSON_FILE, WEIGHTS_FILE, MOMENTS_FILE = "stratavit.json", "model.safetensors", "moments.safetensors"
SUPER, SUB = "super-network", "sub-network"


def kind(path: str | Path) -> str:
    """``super-network`` or ``sub-network``: what a folder holds.

    Raises:
        ArtifactError: The folder is not one of StrataViT's.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected one saved by StrataViT")
    found = read_json(folder / JSON_FILE).get("format")
    if found not in (f"stratavit/{SUPER}", f"stratavit/{SUB}"):
        raise ArtifactError(f"{folder / JSON_FILE}: format {described(found)} is not one of StrataViT's")
    return str(found).removeprefix("stratavit/")


def is_supernet(path: str | Path) -> bool:
    """Whether it is a folder of a super-network; any other name or folder is not."""
    return (Path(path) / JSON_FILE).is_file() and kind(path) == SUPER


def write_saved(
    path: str | Path,
    model: nn.Module,
    content: Mapping[str, Any],
    overwrite: bool,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a folder: weights, moments if there are any, the JSON file with their hashes, and timm's where it applies.

    Args:
        path: The folder.
        model: Its state dict is timm's.
        content: Of the JSON file.
        overwrite: Replace a folder that is not empty.
        moments: Of a super-network.

    Raises:
        ArtifactError: It cannot be written.
    """

    def write(folder: Path) -> None:
        save_file(_contiguous(model.state_dict()), folder / WEIGHTS_FILE, {"format": "pt"})
        if moments is not None:
            save_file(_contiguous(moments), folder / MOMENTS_FILE)
        files = [folder / name for name in (WEIGHTS_FILE, MOMENTS_FILE) if (folder / name).exists()]
        write_json(folder / JSON_FILE, checksums.added(dict(content), JSON_FILE, files))
        config = timm_config.timm_config(content["model"], content["data_config"])
        if config is not None:
            write_json(folder / timm_config.FILE, config)

    write_folder(path, write, overwrite)


def header(kind: str) -> dict[str, Any]:
    """What every JSON file begins with: the kind of folder, the version of the format, and who wrote it."""
    versions = {"stratavit": __version__, "timm": timm.__version__, "torch": torch.__version__}
    return {"format": f"stratavit/{kind}", "format_version": FORMAT_VERSION, "versions": versions}


def read_header(folder: Path, expected: str) -> dict[str, Any]:
    """The JSON file of a folder of the kind that is expected, its hash and version compared.

    Raises:
        ArtifactError: It is of another kind or version, or damaged.
    """
    found = kind(folder)
    if found != expected:
        hint = (
            "load it with SuperNet.load, or slice a size out of it: stratavit extract"
            if found == SUPER
            else "load it with stratavit.load; super-networks are made by stratavit convert"
        )
        raise ArtifactError(f"{folder} holds a {found}: {hint}")
    content = read_json(folder / JSON_FILE)
    if content.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder}: format version {described(content.get('format_version'))} is not {FORMAT_VERSION}; "
            "load it with the StrataViT release that wrote it, named under 'versions'"
        )
    checksums.check_content(content, folder / JSON_FILE)
    if not isinstance(content.get("provenance", {}), dict):
        raise ArtifactError(f"{folder / JSON_FILE}: provenance should be a JSON object")
    if not isinstance(content.get("model"), dict):
        raise ArtifactError(f"{folder / JSON_FILE}: the model's description is missing")
    return content


def load_model(content: Mapping[str, Any], folder: Path, device: torch.device | str) -> nn.Module:
    """The model of a folder, in timm's form and eval mode.

    Raises:
        ArtifactError: Its description cannot be built, or the weights do not fit.
    """
    source, weights = str(folder / JSON_FILE), folder / WEIGHTS_FILE
    checksums.check_file(content, weights)
    model: Any = size_checks.build_model(content["model"], read_shapes(weights), source, str(weights))
    tensors = read_tensors(weights)
    if checksums.KEY not in content:
        check_one_type(tensors, str(weights))
    load_weights(model, tensors, str(weights), assign=True)
    frozen = content.get("frozen", [])
    if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
        raise ArtifactError(f"{source}: frozen should be a list of names of parameters; save the model again")
    set_frozen(model, frozen, f"{source}: frozen")
    architecture_name = content["model"]["architecture"]
    model.pretrained_cfg = {"architecture": architecture_name} | _read_label_names(content, folder)
    model.source_args = dict(content["model"]["args"])
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    architecture.cast_computed(model, dtype)
    loaded: nn.Module = model.to(device).eval()
    return loaded


def label_names(model: Any) -> dict[str, list[str]]:
    """The names of the classes, where timm's configuration of a model has them."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    names = class_names_of(model) if named else None
    return {"label_names": names} if names else {}


def _read_label_names(content: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    if "label_names" not in content:
        return {}
    names = content["label_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{folder / JSON_FILE}: label_names should be a list of texts, got {described(names)}")
    return {"label_names": names}


def read_origin(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The model of transformers that this one came from, if any."""
    origin = content.get("origin")
    if origin is None:
        return None
    sound = isinstance(origin, dict) and origin.get("class") in [*LAYOUTS] and isinstance(origin.get("config"), dict)
    if not sound:
        raise ArtifactError(f"{folder / JSON_FILE}: origin should be a class of {', '.join(LAYOUTS)} and its config")
    return dict(origin)


def read_data_config(content: Mapping[str, Any], folder: Path, model: nn.Module) -> dict[str, Any]:
    """How images are prepared for the model of a folder.

    Raises:
        ArtifactError: Not in a way that the model takes.
    """
    config = content.get("data_config")
    size = config.get("input_size") if isinstance(config, dict) else None
    if not isinstance(size, list) or [type(n) for n in size] != [int, int, int] or min(size) < 1:
        raise ArtifactError(f"{folder / JSON_FILE}: data_config needs an input_size of three whole numbers above 0")
    assert isinstance(config, dict)
    wrong = [key for key, fits in _FITS.items() if key in config and not fits(config[key])]
    wrong += ["input_size"] if max(size) > 1 << 14 else []
    if wrong:
        raise ArtifactError(
            f"{folder / JSON_FILE}: data_config: {wrong[0]} is {described(config[wrong[0]])}, "
            "which prepares no images; save the model again"
        )
    config["input_size"] = architecture.own_size(model, size)
    size_checks.check_images(model, config["input_size"], str(folder / JSON_FILE))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) < 1000 and all(_number(number) for number in value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "mean": _numbers,
    "std": lambda value: _numbers(value) and min(value) > 0,
    "crop_pct": lambda value: _number(value) and 0.01 <= value <= 10,
    "interpolation": lambda value: value in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
    "crop_mode": lambda value: value in ("center", "squash", "border"),
}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As files hold them: dense, on the CPU, none sharing memory with another."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous().cpu()
        found[name] = dense.clone() if dense.data_ptr() in places else dense
        places.add(dense.data_ptr())
    return found
