"""The folder of a super-network as plain state, to and from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.artifacts.folder_format import (
    JSON_FILE,
    MOMENTS_FILE,
    SUPER,
    header,
    label_names,
    load_model,
    read_data_config,
    read_header,
    read_origin,
    write_saved,
)
from stratavit.artifacts.moments import FACTOR
from stratavit.elastic.site import HEAD_DIM_UNIT, MLP_UNITS
from stratavit.errors import ArtifactError, described
from stratavit.files import checksums
from stratavit.files.folders import read_tensors


@dataclass(frozen=True)
class SavedSuperNet:
    """What a folder of a super-network holds.

    Attributes:
        model: The timm model, built, at full size.
        content: The JSON file, checked as far as it is not the dropout list's.
        data_config: How images are prepared.
        units: See `SuperNet.set_units`.
        moments: Tensors of `moments_file`.
        source, moments_source: Names of the files, for messages.
    """

    model: nn.Module
    content: Mapping[str, Any]
    data_config: dict[str, Any]
    units: tuple[int, int]
    moments: Mapping[str, Tensor]
    source: str
    moments_source: str


def write_super_network(
    path: str | Path, model: nn.Module, facts: Mapping[str, Any], moments: Mapping[str, Tensor], overwrite: bool
) -> None:
    """Writes the folder of a super-network.

    Args:
        path: The folder.
        model: The elastic model; its state dict is timm's.
        facts: Parts of the JSON file: ``model`` (its description), ``data_config`` and more.
        moments: Tensors of `moments_file`.
        overwrite: Replace a folder that is not empty.

    Raises:
        ArtifactError: It cannot be written.
    """
    write_saved(path, model, header(SUPER) | dict(facts) | label_names(model), overwrite, moments)


def read_super_network(path: str | Path, device: torch.device | str, moments: bool = True) -> SavedSuperNet:
    """Reads what `write_super_network` wrote; runs no code from the files.

    Args:
        path: The folder.
        device: Of the weights.
        moments: Read second moments, too.

    Raises:
        ArtifactError: The folder is not a super-network's, or damaged.
    """
    folder = Path(path)
    content = read_header(folder, SUPER)
    model: Any = load_model(content, folder, device)
    model.origin = read_origin(content, folder)
    data_config, units = read_data_config(content, folder, model), _units(content, folder)
    source = folder / MOMENTS_FILE
    checksums.check_file(content, source)
    tensors = read_tensors(source, without=None if moments else FACTOR)
    return SavedSuperNet(model, content, data_config, units, tensors, str(folder / JSON_FILE), str(source))


def moments_bytes(path: str | Path) -> int:
    """Size of the moments in a super-network's folder."""
    return (Path(path) / MOMENTS_FILE).stat().st_size


def _units(content: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    units = content.get("units", [HEAD_DIM_UNIT, MLP_UNITS])
    if not isinstance(units, list) or [type(n) for n in units] != [int, int] or min(units) < 1:
        raise ArtifactError(f"{folder / JSON_FILE}: units should be two whole numbers above 0, got {described(units)}")
    return units[0], units[1]
