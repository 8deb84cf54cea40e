"""Reading checkpoints of other tools and files that `torch.save` wrote; nothing in them is executed."""

from __future__ import annotations

import mmap
import re
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratavit.errors import ArtifactError, one_line, out_of_memory, shown
from stratavit.files.folders import read_tensors

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "encoder")  # timm's order, then its filters'
AVERAGED = ("state_dict_ema", "model_ema")
COMPANY = (  # what training scripts keep next to the weights
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
    """Stands for an object next to the weights, whatever was to be made of it; its own class is never called."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def check_archive(path: Path, prefix: str, advice: str = "copy it again") -> None:
    """Compares the parts of a file that `torch.save` wrote with their checksums, which `torch.load` does not.

    Files of the old form, which are not archives, have no checksums.

    Args:
        path: Of the file.
        prefix, advice: Begin and end the message.

    Raises:
        ArtifactError: A part differs, or the file holds what torch never writes for tensors and what may need any
            amount of memory: a compressed part or a bytearray.
        MemoryError: There is not enough memory.
    """
    if not path.is_file():
        raise ArtifactError(f"{prefix}{path} is not a file; {advice}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"bytearray\n") >= 0:  # in a pickle: the name of what it makes
                raise ArtifactError(
                    f"{prefix}{path} holds a bytearray, which may be of any length; save a state dict of tensors only"
                )
            if content[:2] != b"PK":
                return
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise zipfile.BadZipFile("compressed")
            broken = archive.testzip()
    except ArtifactError:
        raise
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        if out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise ArtifactError(f"{prefix}{path} is damaged; {advice}") from error
    if broken is not None:
        raise ArtifactError(f"{prefix}{path} is damaged (the checksum of {shown(broken)} differs); {advice}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the state dict of a checkpoint, without its nests; nothing in the file is executed.

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
    return _unnested(load_plain(path), path)


def load_plain(path: Path) -> Any:
    """Loads tensors and plain values; objects of the classes in `COMPANY` become `Inert`.

    Raises:
        ArtifactError: The file is damaged or holds other objects.
        MemoryError: There is not enough memory.
    """
    try:
        with _TURN, torch.serialization.safe_globals([(Inert, name) for name in COMPANY]):
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
        inside = [key for key in NESTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not inside:
            break
        if inside[0] in AVERAGED and {"state_dict", "model"} & {*inside}:
            print(f"weights: {path} holds averaged weights, too: {inside[0]} is used", file=sys.stderr)
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"weights: {path} does not hold a state dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            entry = f"{shown(str(name))} is of type {type(value).__name__}"
            raise ArtifactError(f"weights: {path} does not hold a state dict of tensors: {entry}; save that alone")
    return dict(content)
