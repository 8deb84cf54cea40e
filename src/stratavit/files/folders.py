"""Writing folders and files completely or not at all, and reading their JSON and tensors without running code."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stratavit.errors import ArtifactError, one_line, out_of_memory, reason_of
from stratavit.files.atomic import followed, move_into_place, readable_errors, temporary_sibling
from stratavit.files.reading import read_small

DEEPEST = 100  # levels of nested objects and arrays in a JSON file; ours have less than ten


def write_folder(path: str | Path, write: Callable[[Path], None], overwrite: bool = False) -> Path:
    """Calls `write` on a temporary folder next to `path`, then lets it take the place of `path`.

    If writing fails or is interrupted, `path` is as it was and nothing is left behind; if the process is killed, `path`
    is as it was, or new and complete.

    Args:
        path: The folder to make.
        write: Fills the folder it is given.
        overwrite: Replace a folder that is not empty.

    Returns:
        The path.

    Raises:
        ArtifactError: `path` is taken, or cannot be written (disk full, no permission).
    """
    path = check_free(path, overwrite)
    with temporary_sibling(followed(path)) as new:
        new.mkdir()
        write(new)
        allowed = new.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
        for file in filter(Path.is_file, new.iterdir()):
            file.chmod(allowed)
        move_into_place(new, followed(path), overwrite)
    return path


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> Path:
    """Writes one file completely or not at all, see `write_folder`.

    Raises:
        ArtifactError: `path` is taken, or cannot be written (disk full, no permission).
    """
    path = check_free_file(path, overwrite)
    with temporary_sibling(followed(path)) as new:
        new.write_bytes(content)
        move_into_place(new, followed(path), overwrite)
    return path


def check_free(path: str | Path, overwrite: bool) -> Path:
    """The path, if a folder may be written there; worth asking before long work.

    Args:
        path: The folder.
        overwrite: It may hold something.

    Raises:
        ArtifactError: It is a file, cannot be written, or is a folder that is not empty while `overwrite` is off.
    """
    path = Path(path)
    with readable_errors(path):
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; give a folder to write to")
        if path.is_dir() and not overwrite and any(path.iterdir()):
            raise ArtifactError(f"{path} is not empty; give another folder or ask to overwrite (--overwrite)")
        _check_writable(path)
    return path


def check_free_file(path: str | Path, overwrite: bool) -> Path:
    """The path, if a file may be written there; worth asking before long work.

    Raises:
        ArtifactError: It is a folder, cannot be written, or is a file while `overwrite` is off.
    """
    path = Path(path)
    with readable_errors(path):
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder; give a file to write to")
        if path.exists() and not overwrite:
            raise ArtifactError(f"{path} exists; give another file or ask to overwrite (--overwrite)")
        _check_writable(path)
    return path


def _check_writable(path: Path) -> None:
    """Raises OSError if nothing can be put in the place of `path`: it is written next to it first."""
    place = followed(path)
    if os.path.ismount(place):
        raise OSError(errno.EBUSY, "a disk is mounted there; give a folder in it")
    parent = next((parent for parent in place.absolute().parents if parent.exists()), place)
    if not parent.is_dir():
        raise OSError(errno.ENOTDIR, f"{parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        fixed = os.name == "posix" and os.statvfs(parent).f_flag & os.ST_RDONLY
        raise OSError(errno.EACCES, f"{parent} is read-only" if fixed else f"no permission to write to {parent}")


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON.

    Raises:
        ArtifactError: See `json_text`.
    """
    path.write_text(json_text(content, path.name) + "\n", encoding="utf-8")


def json_text(content: Any, name: str) -> str:
    """Readable JSON.

    Raises:
        ArtifactError: The content has NaN, infinity or an object that JSON does not have, or is nested too deeply to be
            read again; `name` is named.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
        _check_depth(content)
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: holds something that JSON cannot ({error}); check the provenance") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ArtifactError: The file is missing, unreadable, too large, not a JSON object, names a key twice, has a number
            that is not finite or is nested too deeply.
    """
    try:
        text = read_small(path).decode()
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        _check_depth(content)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is not a folder saved by StrataViT: {path.name} is missing") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({one_line(error)}); save the model again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"it names {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        nested = [one for one in level if isinstance(one, dict | list | tuple)]
        if not nested:
            return
        level = [inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone.

    Raises:
        ArtifactError: See `read_tensors`.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path, without: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Args:
        path: The file.
        without: Ending of the names of tensors that are not read.

    Raises:
        ArtifactError: The file is missing, truncated or otherwise damaged.
        MemoryError: It is sound, but there is not enough memory.
    """
    with _reading(path):
        if without is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.endswith(without)}  # noqa: SIM118


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is incomplete: {path.name} is missing") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        if out_of_memory(error) or "(os error 12)" in str(error):
            raise MemoryError(str(error)) from error
        reason = " ".join(reason_of(error).split())[:200]
        raise ArtifactError(f"{path} is damaged or not a safetensors file ({reason})") from error
