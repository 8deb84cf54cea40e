"""Saving and loading super-networks and sub-networks: safetensors and one JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stratavit import announced, architecture, hashes, intake, moments_file, timm_config
from stratavit.class_names import class_names_of
from stratavit.classifier import with_plain_head
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, described
from stratavit.fidelity import Subject, check_saved
from stratavit.folders import read_json, read_shapes, read_tensors, write_folder, write_json
from stratavit.following import check_followed
from stratavit.foreign import as_source, as_timm
from stratavit.freezing import frozen_names, set_frozen
from stratavit.hf_layouts import LAYOUTS
from stratavit.strata import Strata
from stratavit.structure import HEAD_DIM_UNIT, MLP_UNITS
from stratavit.weights import check_one_type, load_weights
from stratavit.wrappers import unwrapped

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet

FORMAT_VERSION = 1
JSON_FILE, WEIGHTS_FILE, MOMENTS_FILE = "stratavit.json", "model.safetensors", "moments.safetensors"
SUPER, SUB = "super-network", "sub-network"


def save(model: nn.Module, path: str | Path, overwrite: bool = False) -> None:
    """Saves a sub-network (or any supported model): ``model.safetensors`` and ``stratavit.json``.

    A model of transformers is saved as timm's equivalent and comes back in its own class.

    Args:
        model: What `SuperNet.extract` returned, trained further or not.
        path: Folder to write.
        overwrite: Replace a folder that is not empty.

    Raises:
        ArtifactError: The model cannot be described, or the folder cannot be written.
    """
    from stratavit.supernet import SuperNet

    given = unwrapped(model)
    if isinstance(given, SuperNet):
        raise ArtifactError("this is a super-network: save it with its own save(path)")
    source = as_timm(given)
    try:
        intake.check(source)
    except UnsupportedModelError as error:
        raise ArtifactError(str(error)) from error
    description, built = architecture.described_and_built(source)
    plain = with_plain_head(source)
    data_config = architecture.resolve_data_config(plain)
    if source is given:  # else `as_timm` has compared
        check_saved(Subject(source, source), architecture.filled(built, plain), data_config["input_size"])
    content = _header(SUB) | {
        "model": description,
        "origin": getattr(plain, "origin", None),
        "data_config": data_config,
        "frozen": frozen_names(plain),
        "provenance": getattr(plain, "provenance", {}),
    }
    content |= _label_names(plain)

    def write(folder: Path) -> None:
        save_file(_tensors(plain), folder / WEIGHTS_FILE, {"format": "pt"})
        _write_json_files(folder, content)

    write_folder(path, write, overwrite)


def load(path: str | Path, device: torch.device | str = "cpu", timm_form: bool = False) -> nn.Module:
    """Reads what `save` wrote: a plain model in eval mode, of timm's class or of transformers' if it came from there.

    Args:
        path: The folder.
        device: Of the weights.
        timm_form: timm's equivalent of a model of transformers, in place of that.

    Raises:
        ArtifactError: The folder is not a sub-network's, or is damaged.
    """
    folder = Path(path)
    content = _read_header(folder, SUB)
    model: Any = _load_model(content, folder, device)
    model.provenance = content.get("provenance", {})
    model.data_config = _data_config(content, folder, model)
    model.origin = _origin(content, folder)
    return model if timm_form else as_source(model)


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


def moments_bytes(path: str | Path) -> int:
    """Size of the moments in a super-network's folder."""
    return (Path(path) / MOMENTS_FILE).stat().st_size


def site_widths(model: nn.Module) -> dict[str, int]:
    """Kept width of every site of a sub-network: its own layers tell."""
    sites = architecture.describe(model)["sites"]
    return {name: site.get("head_dim", site.get("hidden_features", 0)) for name, site in sites.items()}


def save_supernet(net: SuperNet, path: str | Path, overwrite: bool, moments: bool = True) -> None:
    """See `SuperNet.save`."""
    if net.released:
        raise ArtifactError(
            "the second moments were released by specialise(); save before, or specialise(moments=True)"
        )
    _ = net.cost  # follows a model that was changed
    intake.check(net.model)
    check_followed(net, net.description)
    content = _header(SUPER) | {
        "method": net.method,
        "compensation": net.compensation if moments or net.compensation != "full" else "mean",
        "model": net.description,
        "origin": net.origin,
        "data_config": net.data_config,
        "units": list(net.units),
        "frozen": frozen_names(net.model),
        "strata": None if net.strata is None else net.strata.to_json(),
        "provenance": net.provenance,
    }
    content |= _label_names(net.model)
    tensors = moments_file.to_tensors(net, second=moments)

    def write(folder: Path) -> None:
        save_file(_tensors(net.model), folder / WEIGHTS_FILE, {"format": "pt"})
        save_file(_contiguous(tensors), folder / MOMENTS_FILE)
        _write_json_files(folder, content)

    write_folder(path, write, overwrite)


def load_supernet(cls: type[SuperNet], path: str | Path, device: torch.device | str, moments: bool = True) -> SuperNet:
    """See `SuperNet.load`."""
    folder = Path(path)
    content = _read_header(folder, SUPER)
    model: Any = _load_model(content, folder, device)
    model.origin = _origin(content, folder)
    net = cls(model, _data_config(content, folder, model), _description=content["model"])
    try:
        net.method = content.get("method", "default")
        net.compensation = content.get("compensation", net.compensation)
    except StrataViTError as error:
        raise ArtifactError(f"{folder / JSON_FILE}: {error}") from error
    net.set_units(*_units(content, folder))
    net.provenance = dict(content.get("provenance", {}))
    source = folder / MOMENTS_FILE
    hashes.check_file(content, source)
    moments_file.from_tensors(net, read_tensors(source, without=None if moments else moments_file.FACTOR), str(source))
    if not moments:
        net.final_mean = None
        net.compensation = "mean" if net.compensation == "full" else net.compensation
    if content.get("strata") is not None:
        net.strata = Strata.from_json(net.sites, content["strata"])
    return net


def _units(content: Mapping[str, Any], folder: Path) -> list[int]:
    units = content.get("units", [HEAD_DIM_UNIT, MLP_UNITS])
    if not isinstance(units, list) or [type(n) for n in units] != [int, int] or min(units) < 1:
        raise ArtifactError(f"{folder / JSON_FILE}: units should be two whole numbers above 0, got {described(units)}")
    return units


def _write_json_files(folder: Path, content: dict[str, Any]) -> None:
    files = [folder / name for name in (WEIGHTS_FILE, MOMENTS_FILE) if (folder / name).exists()]
    write_json(folder / JSON_FILE, hashes.added(content, JSON_FILE, files))
    config = timm_config.timm_config(content["model"], content["data_config"])
    if config is not None:
        write_json(folder / timm_config.FILE, config)


def _header(kind: str) -> dict[str, Any]:
    from stratavit import __version__

    versions = {"stratavit": __version__, "timm": timm.__version__, "torch": torch.__version__}
    return {"format": f"stratavit/{kind}", "format_version": FORMAT_VERSION, "versions": versions}


def _read_header(folder: Path, expected: str) -> dict[str, Any]:
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
    hashes.check_content(content, folder / JSON_FILE)
    if not isinstance(content.get("provenance", {}), dict):
        raise ArtifactError(f"{folder / JSON_FILE}: provenance should be a JSON object")
    if not isinstance(content.get("model"), dict):
        raise ArtifactError(f"{folder / JSON_FILE}: the model's description is missing")
    return content


def _load_model(content: Mapping[str, Any], folder: Path, device: torch.device | str) -> nn.Module:
    source, weights = str(folder / JSON_FILE), folder / WEIGHTS_FILE
    hashes.check_file(content, weights)
    model: Any = announced.build_model(content["model"], read_shapes(weights), source, str(weights))
    tensors = read_tensors(weights)
    if hashes.KEY not in content:
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


def _label_names(model: Any) -> dict[str, list[str]]:
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


def _origin(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The model of transformers that this one came from, if any."""
    origin = content.get("origin")
    if origin is None:
        return None
    sound = isinstance(origin, dict) and origin.get("class") in [*LAYOUTS] and isinstance(origin.get("config"), dict)
    if not sound:
        raise ArtifactError(f"{folder / JSON_FILE}: origin should be a class of {', '.join(LAYOUTS)} and its config")
    return dict(origin)


def _data_config(content: Mapping[str, Any], folder: Path, model: nn.Module) -> dict[str, Any]:
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
    announced.check_images(model, config["input_size"], str(folder / JSON_FILE))
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return _contiguous(model.state_dict())


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As files hold them: dense, on the CPU, none sharing memory with another."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().contiguous().cpu()
        found[name] = dense.clone() if dense.data_ptr() in places else dense
        places.add(dense.data_ptr())
    return found
