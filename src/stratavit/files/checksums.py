"""SHA-256 of what a folder holds, written into its JSON file and compared when it is read.

They find damage (a bad disk, a broken transfer, a file of another run). They do not say who wrote a file: whoever
changes one can change its hash, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratavit.errors import ArtifactError, one_line
from stratavit.files.folders import json_text

KEY = "hashes"
CHUNK = 1 << 20


def of_file(path: Path) -> str:
    """Of a file's bytes: what ``sha256sum`` says.

    Raises:
        ArtifactError: It cannot be read.
    """
    found = hashlib.sha256()
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"cannot read {path}: it is not a regular file")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.parent} is incomplete: {path.name} is missing") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    return found.hexdigest()


def of_content(content: Mapping[str, Any]) -> str:
    """Of a JSON object without its own hashes, however its text is spaced and its keys are ordered."""
    rest = {key: value for key, value in content.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def added(content: dict[str, Any], name: str, files: Iterable[Path]) -> dict[str, Any]:
    """The content of a JSON file with hashes of itself and of the files that lie beside it.

    Args:
        content: Without hashes.
        name: Of the JSON file.
        files: Those beside it, as they are on the disk.
    """
    read_back = json.loads(json_text(content, name))  # keys that are no strings become strings
    return content | {KEY: {name: of_content(read_back), **{path.name: of_file(path) for path in files}}}


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Compares a JSON object with the hash in it; folders of older releases have none.

    Raises:
        ArtifactError: They differ, or the hashes are no hashes.
    """
    known = content.get(KEY)
    if known is None:
        return
    sound = isinstance(known, dict) and all(isinstance(value, str) and len(value) == 64 for value in known.values())
    if not sound or path.name not in known:
        raise ArtifactError(f"{path}: {KEY} should hold a SHA-256 for each file; copy it or save the model again")
    if of_content(content) != known[path.name]:
        raise ArtifactError(
            f"{path} is not what was saved (its hash differs): copy it or save the model again; "
            f"if you changed it yourself, take {KEY!r} out"
        )


def check_file(content: Mapping[str, Any], path: Path) -> None:
    """Compares a file with the hash that the JSON file beside it has, if it has any.

    Raises:
        ArtifactError: They differ, or this file's is missing.
    """
    known = content.get(KEY)
    if known is not None and known.get(path.name) != of_file(path):
        raise ArtifactError(f"{path} is not what was saved (its hash differs): copy the file or save the model again")
