"""Reading checkpoints that other tools wrote: whatever nests, prefixes or accompanies the weights; no code is run."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratavit.errors import ArtifactError, one_line, out_of_memory, shown
from stratavit.files.folders import read_tensors
from stratavit.files.torch_checkpoint import check_archive

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "encoder")  # timm's order, then its filters'
AVERAGED = ("state_dict_ema", "model_ema")
_BESIDE = (  # what training scripts keep beside the weights
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)
_TURN = threading.Lock()  # torch keeps what it allows for the whole process


class Inert:
    """Stands for an object beside the weights, whatever was to be made of it; its own class is never called."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file; nothing in the file is executed.

    Args:
        path: ``.safetensors``, or what `torch.save` wrote: a state dict, or one inside `NESTS`.

    Raises:
        ArtifactError: The file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise ArtifactError(f"weights: {path} is not a file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    check_archive(path, "weights: ")
    return _unnested(_loaded(path), path)


def _loaded(path: Path) -> Any:
    try:
        return _load(path, ())
    except ArtifactError as refused:
        if not any(name in str(refused) for name in _BESIDE):
            raise
    with _TURN:
        return _load(path, _BESIDE)


def _load(path: Path, inert: Iterable[str]) -> Any:
    try:
        with ExitStack() as stack:
            if inert:
                stack.enter_context(torch.serialization.safe_globals([(Inert, name) for name in inert]))
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for damage differs with its place
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if found is None:
            what = "is damaged or holds more than plain tensors, which is not loaded"
        else:
            what = f"holds more than plain tensors ({shown(found[1])}), which is not loaded; save its state dict alone"
        raise ArtifactError(f"weights: {path} {what}") from error


def _unnested(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in NESTS:
        if not isinstance(content, Mapping):
            break
        nest = next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        if nest in AVERAGED and any(isinstance(content.get(key), Mapping) for key in NESTS[2:4]):
            print(f"weights: {path} holds averaged weights, too: {nest} is taken", file=sys.stderr)
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"weights: {path} does not hold a state dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            entry = f"{shown(str(name))} is of type {type(value).__name__}"
            raise ArtifactError(f"weights: {path} does not hold a state dict of tensors: {entry}; save that alone")
    return dict(content)
