"""Saving and loading sub-networks: safetensors and one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.artifacts.folder_format import SUB, read_saved, write_saved
from stratavit.errors import ArtifactError, UnsupportedModelError
from stratavit.interop.libraries import as_source, as_timm
from stratavit.models import architecture, source_checks
from stratavit.models.freezing import frozen_names
from stratavit.models.output_checks import Subject, check_same_outputs
from stratavit.spec import TOKENS
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import is_super_network
from stratavit.utils.wrappers import unwrapped


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
    given = unwrapped(model)
    if is_super_network(given):
        raise ArtifactError("this is a super-network: save it with its own save(path)")
    source = as_timm(given)
    try:
        source_checks.check(source)
    except UnsupportedModelError as error:
        raise ArtifactError(str(error)) from error
    description, built = architecture.described_and_built(source)
    plain = with_plain_head(source)
    data_config = architecture.resolve_data_config(plain)
    if source is given:  # else `as_timm` has compared
        built = architecture.filled(built, plain)
        check_same_outputs(
            "save", ArtifactError, Subject(source, source), [Subject(built, built)], data_config["input_size"]
        )
    facts = {
        "model": description,
        "origin": getattr(plain, "origin", None),
        "data_config": data_config,
        "frozen": frozen_names(plain),
        "provenance": getattr(plain, "provenance", {}),
    }
    write_saved(path, SUB, plain, facts, overwrite)


def load(path: str | Path, device: torch.device | str = "cpu", timm_form: bool = False) -> nn.Module:
    """Reads what `save` wrote: a plain model in eval mode, of timm's class or of transformers' if it came from there.

    Args:
        path: The folder.
        device: Of the weights.
        timm_form: timm's equivalent of a model of transformers, in place of that.

    Returns:
        The model, in eval mode on the device.

    Raises:
        ArtifactError: The folder is not a sub-network's, or is damaged.
    """
    model: Any
    model, content = read_saved(path, SUB, device)
    model.provenance, model.data_config = content["provenance"], content["data_config"]
    return model if timm_form else as_source(model)


def site_widths(model: nn.Module) -> dict[str, int]:
    """The width kept at every site of a sub-network, and the tokens where it merges some, read from its layers."""
    found = architecture.describe(model)
    width = "num_heads" if found.get("whole_heads") else "head_dim"
    widths = {name: site.get(width, site.get("hidden_features", 0)) for name, site in found["sites"].items()}
    return widths | {name + TOKENS: count for name, count in found.get("tokens", {}).get("keep", {}).items()}
