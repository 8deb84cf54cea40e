"""An exported file as a model, to measure it like any other: ONNX or OpenVINO, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import ArtifactError, StrataViTError, one_line
from stratavit.interop.onnx_file import onnx_session
from stratavit.interop.openvino_file import FILE, SECTION, compiled, read_openvino
from stratavit.models.architecture import DATA_KEYS

FACTS = ("data_config", "label_names", "num_classes", "prefix_tokens")  # see `onnx_file.metadata_of`


class ExportedModel(nn.Module):
    """Images to logits, features or maps by another runtime.

    Args:
        path: The file.
        run: Maps images ``[B, C, H, W]`` to outputs ``[B, ...]``, both NumPy arrays.
        width: Of the output; None if it is not known.
        facts: The file's metadata, JSON texts.

    Attributes:
        data_config: How images must be prepared, from the file.
        num_classes: Of the output; 0 where the file says that it returns features or maps.
        num_prefix_tokens: Tokens in front of the patches of a map, as the file says.

    Raises:
        ArtifactError: The file does not say how its images are prepared.
    """

    def __init__(self, path: Path, run: Callable[[Any], Any], width: int | None, facts: Mapping[str, str]) -> None:
        super().__init__()
        self.path, self.run = path, run
        self.num_classes: int = _read(facts, "num_classes", path) if "num_classes" in facts else width or 0
        self.num_prefix_tokens: int = _read(facts, "prefix_tokens", path) if "prefix_tokens" in facts else 0
        self.data_config = _read(facts, "data_config", path)
        self.pretrained_cfg = {"label_names": _read(facts, "label_names", path)} if "label_names" in facts else {}
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # images are expected where this is

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, classes]``, features ``[B, D]`` or maps ``[B, N, C]``."""
        try:
            return torch.from_numpy(self.run(images.numpy())).float()
        except Exception as error:  # errors of other runtimes have classes of their own
            raise StrataViTError(
                f"{self.path} cannot run images of {tuple(images.shape)}: {one_line(error)}"
            ) from error


def is_exported(path: str | Path) -> bool:
    """Whether a path names a file, or a folder with one, that `exported_model` opens."""
    return str(path).lower().endswith((".onnx", ".xml")) or (Path(path) / FILE).is_file()


def exported_model(path: str | Path) -> ExportedModel:
    """Opens a file that `export` wrote, or another one with one input of images whose batch size is free.

    Args:
        path: An ONNX file, an OpenVINO file (``.xml``), or its folder.

    Raises:
        StrataViTError: The packages are missing.
        ArtifactError: The file cannot be read, or does not say how its images are prepared.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file; expected one that `stratavit export` wrote")
    kind, read = ("OpenVINO", _openvino) if path.suffix.lower() == ".xml" else ("ONNX", _onnx)
    try:
        return ExportedModel(path, *read(path))
    except ImportError as error:
        raise StrataViTError("running ONNX needs more packages: pip install 'stratavit[export]'") from error
    except StrataViTError:
        raise
    except Exception as error:  # as above
        raise ArtifactError(f"{path} is not an {kind} file that can be run here ({one_line(error)})") from error


def _onnx(path: Path) -> tuple[Callable[[Any], Any], int | None, dict[str, str]]:
    session = onnx_session(path)
    (source, *_), (result, *_) = session.get_inputs(), session.get_outputs()
    width = result.shape[-1] if isinstance(result.shape[-1], int) else None
    facts = session.get_modelmeta().custom_metadata_map
    return lambda images: session.run(None, {source.name: images})[0], width, facts


def _openvino(path: Path) -> tuple[Callable[[Any], Any], int | None, dict[str, str]]:
    model = read_openvino(path)
    shape = model.outputs[0].partial_shape
    width = shape[len(shape) - 1].get_length() if shape[len(shape) - 1].is_static else None
    keys = [key for key in FACTS if model.has_rt_info([SECTION, key])]
    facts = {key: str(model.get_rt_info([SECTION, key]).value) for key in keys}
    run = compiled(model)
    return lambda images: run(images)[0].copy(), width, facts  # OpenVINO writes to one place


def _read(facts: Mapping[str, str], key: str, path: Path) -> Any:
    """A part of a file's metadata."""
    try:
        found = json.loads(facts[key])
        if key == "data_config":
            return {key: found[key] for key in sorted(DATA_KEYS)}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} does not say how its images are prepared ({key}); export it again with `stratavit export`"
        ) from error
    return found
