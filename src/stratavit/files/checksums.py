"""SHA-256 of the contents of a folder, written into its JSON file and compared when it is read.

They find damage (a bad disk, a broken transfer, a file of another run), not intent: whoever changes a file can change
its hash, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratavit.errors import ArtifactError, reason_of
from stratavit.files.folders import json_text

KEY = "hashes"
CHUNK = 1 << 20


def added(content: dict[str, Any], name: str, files: Iterable[Path]) -> dict[str, Any]:
    """The content of a JSON file with hashes of itself and of the files next to it.

    Args:
        content: Without hashes.
        name: Of the JSON file.
        files: The others, as they are on the disk.
    """
    read_back = json.loads(json_text(content, name))  # keys of other types become strings
    return content | {KEY: {name: _of_content(read_back), **{path.name: _of_file(path) for path in files}}}


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Compares a JSON object with the hash in it; folders of older releases have none.

    Raises:
        ArtifactError: They differ.
    """
    known = content.get(KEY)
    if known is not None and (not isinstance(known, dict) or known.get(path.name) != _of_content(content)):
        raise ArtifactError(
            f"{path} is not what was saved (its hash differs): copy it or save the model again; "
            f"if you changed it yourself, take {KEY!r} out"
        )


def check_file(content: Mapping[str, Any], path: Path) -> None:
    """Compares a file with its hash in the JSON file next to it, if that has any.

    Raises:
        ArtifactError: They differ, or this file's is missing.
    """
    known = content.get(KEY)
    if known is not None and known.get(path.name) != _of_file(path):
        raise ArtifactError(f"{path} is not what was saved (its hash differs): copy the file or save the model again")


def _of_file(path: Path) -> str:
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
        raise ArtifactError(f"cannot read {path}: {reason_of(error)}") from error
    return found.hexdigest()


def _of_content(content: Mapping[str, Any]) -> str:
    """Of a JSON object without its own hashes, however its text is spaced and its keys are ordered."""
    rest = {key: value for key, value in content.items() if key != KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
