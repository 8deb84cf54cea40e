"""An exported ONNX file as a model, to measure it like any other; it runs on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import ArtifactError, StrataViTError, one_line
from stratavit.interop.export import onnx_session
from stratavit.models.architecture import DATA_KEYS


class OnnxModel(nn.Module):
    """Images to logits by ONNX Runtime.

    Args:
        path: A file that `export` wrote, or another one with one input of images whose batch size is free.

    Attributes:
        data_config: How images must be prepared, from the file.
        num_classes: Of the output.

    Raises:
        StrataViTError: The packages are missing.
        ArtifactError: The file cannot be read, or does not say how its images are prepared.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"{path} is not a file; expected one that `stratavit export` wrote")
        try:
            self.session = onnx_session(self.path)
        except ImportError as error:
            raise StrataViTError("running ONNX needs more packages: pip install 'stratavit[export]'") from error
        except Exception as error:  # errors of ONNX Runtime have classes of their own
            raise ArtifactError(f"{path} is not an ONNX file that can be run here ({one_line(error)})") from error
        source, result = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.input: str = source.name
        self.num_classes = result.shape[-1] if isinstance(result.shape[-1], int) else 0
        facts = self.session.get_modelmeta().custom_metadata_map
        self.data_config = _read(facts, "data_config", path)
        self.pretrained_cfg = {"label_names": _read(facts, "label_names", path)} if "label_names" in facts else {}
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # images are expected where this is

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        try:
            found = self.session.run(None, {self.input: images.numpy()})[0]
        except Exception as error:  # as above
            raise StrataViTError(
                f"{self.path} cannot run images of {tuple(images.shape)}: {one_line(error)}"
            ) from error
        return torch.from_numpy(found).float()


def _read(facts: dict[str, str], key: str, path: str | Path) -> Any:
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
