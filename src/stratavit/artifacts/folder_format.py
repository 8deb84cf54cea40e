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
from stratavit.artifacts.moments import FACTOR
from stratavit.data.class_names import class_names_of
from stratavit.elastic.site import HEAD_DIM_UNIT, MLP_UNITS
from stratavit.errors import ArtifactError, described
from stratavit.files import checksums
from stratavit.files.folders import read_json, read_shapes, read_tensors, write_folder, write_json
from stratavit.files.state_dicts import load_weights
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
    """Whether a path is the folder of a super-network; False for any other name or folder."""
    return (Path(path) / JSON_FILE).is_file() and kind(path) == SUPER


def write_saved(
    path: str | Path,
    kind: str,
    model: nn.Module,
    facts: Mapping[str, Any],
    overwrite: bool,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a folder: weights, moments if there are any, the JSON file with their hashes, and timm's.

    Args:
        path: The folder.
        kind: `SUPER` or `SUB`.
        model: Its state dict is timm's.
        facts: Parts of the JSON file: ``model`` (its description), ``data_config`` and more.
        overwrite: Replace a folder that is not empty.
        moments: Of a super-network.

    Raises:
        ArtifactError: It cannot be written.
    """
    versions = {"stratavit": __version__, "timm": timm.__version__, "torch": torch.__version__}
    content = {"format": f"stratavit/{kind}", "format_version": FORMAT_VERSION, "versions": versions, **facts}
    names = class_names_of(model)
    named = {"label_names": names} if names else {}
    content |= named

    def write(folder: Path) -> None:
        files = [folder / WEIGHTS_FILE]
        save_file(_contiguous(model.state_dict()), files[0], {"format": "pt"})
        if moments is not None:
            files.append(folder / MOMENTS_FILE)
            save_file(_contiguous(moments), files[1])
        write_json(folder / JSON_FILE, checksums.added(content, JSON_FILE, files))
        config = timm_config.timm_config(content["model"], content["data_config"])
        write_json(folder / timm_config.FILE, config | named)

    write_folder(path, write, overwrite)


def read_saved(path: str | Path, kind: str, device: torch.device | str) -> tuple[nn.Module, dict[str, Any]]:
    """Reads what `write_saved` wrote, but for the moments; runs no code from the files.

    Args:
        path: The folder.
        kind: `SUPER` or `SUB`.
        device: Of the weights.

    Returns:
        The model in timm's form and eval mode, with its `origin`; and the JSON file, its parts checked but for the
        dropout list.

    Raises:
        ArtifactError: The folder is of another kind or version, or damaged.
    """
    folder = Path(path)
    content = _read_header(folder, kind)
    model: Any = _load_model(content, folder).to(device).eval()
    model.origin = _read_origin(content, folder)
    content["data_config"] = _read_data_config(content, folder, model)
    units = content.setdefault("units", [HEAD_DIM_UNIT, MLP_UNITS])
    sound = isinstance(units, list) and [type(n) for n in units] == [int, int] and min(units) >= 1
    _expect(
        sound or units == "gpu", folder, f"units should be two whole numbers above 0, or gpu, got {described(units)}"
    )
    return model, content


def read_moments(path: str | Path, content: Mapping[str, Any], second: bool = True) -> tuple[dict[str, Tensor], str]:
    """Reads the moments of a super-network's folder.

    Args:
        path: The folder.
        content: Its JSON file.
        second: Read second moments, too.

    Returns:
        The tensors by name, and the name of the file.

    Raises:
        ArtifactError: The file is damaged.
    """
    source = Path(path) / MOMENTS_FILE
    checksums.check_file(content, source)
    return read_tensors(source, without=None if second else FACTOR), str(source)


def moments_bytes(path: str | Path) -> int:
    """Size of the moments in a super-network's folder."""
    return (Path(path) / MOMENTS_FILE).stat().st_size


def _expect(sound: bool, folder: Path, message: str) -> None:
    if not sound:
        raise ArtifactError(f"{folder / JSON_FILE}: {message}; save the model again")


def _read_header(folder: Path, expected: str) -> dict[str, Any]:
    """The JSON file, its kind, version and hash compared."""
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
    for key in ("model", "provenance"):
        _expect(isinstance(content.setdefault(key, {}), dict), folder, f"{key} should be a JSON object")
    return content


def _load_model(content: Mapping[str, Any], folder: Path) -> nn.Module:
    source, weights = str(folder / JSON_FILE), folder / WEIGHTS_FILE
    checksums.check_file(content, weights)
    model: Any = size_checks.build_model(content["model"], read_shapes(weights), source, str(weights))
    tensors = read_tensors(weights)
    load_weights(model, tensors, str(weights), assign=True)
    frozen, names = content.get("frozen", []), content.get("label_names", [])
    for key, value in (("frozen", frozen), ("label_names", names)):
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        _expect(texts, folder, f"{key} should be a list of texts, got {described(value)}")
    set_frozen(model, frozen, f"{source}: frozen")
    model.pretrained_cfg = {"architecture": content["model"]["architecture"]} | (
        {"label_names": names} if names else {}
    )
    model.source_args = dict(content["model"]["args"])
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    architecture.cast_computed(model, dtype)
    loaded: nn.Module = model
    return loaded


def _read_origin(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The model of transformers that this one came from, if any."""
    origin = content.get("origin")
    if origin is None:
        return None
    known = isinstance(origin, dict) and origin.get("class") in [*LAYOUTS] and isinstance(origin.get("config"), dict)
    _expect(known, folder, f"origin should be a class of {', '.join(LAYOUTS)} and its config")
    return dict(origin)


def _read_data_config(content: Mapping[str, Any], folder: Path, model: nn.Module) -> dict[str, Any]:
    """How images are prepared, in a way that fits the model."""
    config: Any = content.get("data_config")
    size: Any = config.get("input_size") if isinstance(config, dict) else None
    sound = isinstance(size, list) and [type(n) for n in size] == [int, int, int] and min(size) >= 1
    _expect(sound and max(size) <= 1 << 14, folder, "data_config needs an input_size of three whole numbers above 0")
    for key in config.keys() & _FITS.keys():
        _expect(
            _FITS[key](config[key]), folder, f"data_config: {key} is {described(config[key])}, which fits no images"
        )
    config["input_size"] = architecture.own_size(model, size)
    size_checks.check_images(model, config["input_size"], str(folder / JSON_FILE))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _numbers(value: Any, low: float = -1e6, high: float = 1e6) -> bool:
    return isinstance(value, list) and value != [] and all(type(n) in (int, float) and low < n <= high for n in value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "mean": _numbers,
    "std": lambda value: _numbers(value, low=0),
    "crop_pct": lambda value: _numbers([value], low=0.01, high=10),
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
