"""Writing a folder whole or not at all, and reading its JSON and tensors without running code."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stratavit.errors import ArtifactError


def write_folder(path: str | Path, write: Callable[[Path], None], overwrite: bool = False) -> Path:
    """Calls `write` on a temporary folder beside `path`, then renames it to `path`.

    If writing fails or is interrupted, `path` is as it was and nothing is left behind.

    Args:
        path: The folder to make.
        write: Fills the folder it is given.
        overwrite: Replace a folder that is not empty.

    Raises:
        ArtifactError: `path` is taken, or cannot be written (disk full, no permission).
    """
    path = check_free(path, overwrite)
    temporary: Path | None = None
    new_parents = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        write(temporary)
        open_to_others(temporary)
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {path}: {_reason(error)}; nothing was left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
    return path


def check_free(path: str | Path, overwrite: bool) -> Path:
    """The path, if a folder may be written there; worth asking before long work.

    Raises:
        ArtifactError: It is a file, or a folder that is not empty while `overwrite` is off.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; give a folder to write to")
        if path.is_dir() and not overwrite and any(path.iterdir()):
            raise ArtifactError(f"{path} is not empty; give another folder or ask to overwrite (--overwrite)")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {_reason(error)}") from error
    return path


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> Path:
    """Writes one file whole or not at all: a temporary one beside it, then a rename.

    Raises:
        ArtifactError: `path` is taken, or cannot be written (disk full, no permission).
    """
    path = check_free_file(path, overwrite)
    temporary: Path | None = None
    new_parents = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        open_to_others(temporary)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {_reason(error)}; nothing was left there") from error
    finally:
        with suppress(OSError):
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        if not path.exists():
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
    return path


def check_free_file(path: str | Path, overwrite: bool) -> Path:
    """The path, if a file may be written there; worth asking before long work.

    Raises:
        ArtifactError: It is a folder, or a file while `overwrite` is off.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder; give a file to write to")
        if path.exists() and not overwrite:
            raise ArtifactError(f"{path} exists; give another file or ask to overwrite (--overwrite)")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {_reason(error)}") from error
    return path


def open_to_others(path: Path) -> None:
    """Gives a private temporary file, or a folder and its files, the permissions that the user's umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    for file in files:
        file.chmod(0o666 & ~umask)
    if path.is_dir():
        path.chmod(0o777 & ~umask)


def _replace(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / "folder")
    try:
        temporary.rename(path)
    except OSError:
        (old / "folder").rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON.

    Raises:
        ArtifactError: The content has NaN, infinity or an object that JSON does not have.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path.name}: holds something that JSON cannot ({error}); check the provenance") from error
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ArtifactError: The file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is not a folder saved by StrataViT: {path.name} is missing") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def read_tensors(path: Path, without: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Args:
        path: The file.
        without: End of the names of tensors that are left where they are.

    Raises:
        ArtifactError: The file is missing, truncated or otherwise damaged.
    """
    try:
        if without is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.endswith(without)}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is incomplete: {path.name} is missing") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged or not a safetensors file ({_reason(error)})") from error
