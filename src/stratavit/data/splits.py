"""Which folder of a data set is trained on, and which one is measured on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stratavit.errors import StrataViTError

SPLITS = {"train": (("train", "training"),), "val": (("val", "valid", "validation"), ("test", "testing"))}
_KIND = {name: names[0] for groups in SPLITS.values() for names in groups for name in names}
_LIKE = re.compile(rf"({'|'.join(sorted(_KIND, key=len, reverse=True))}|dev|eval)($|[^a-z])")
_EXPECTED = "expected train/ and val/ with one folder of images per class"


def kind_of_split(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for a usual name of a split in any upper and lower case; else None."""
    return _KIND.get(name.casefold())


def looks_like_split(name: str) -> bool:
    """Whether a folder's name begins as that of a split, such as ``test_set``."""
    return _LIKE.match(name.casefold()) is not None


def find_split(data: str | Path, split: str) -> Path | None:
    """The folder of a split in a data set: of ``val`` the first of val/ (valid/, validation/) and test/ (testing/).

    Args:
        data: The data set.
        split: ``train`` or ``val``.

    Returns:
        None where there is no such folder.

    Raises:
        StrataViTError: There are two folders for one split; they are never merged, and neither is guessed.
    """
    found = _named(Path(data))
    for names in SPLITS[split]:
        folders = found.get(names[0], [])
        if len(folders) > 1:
            both = " and ".join(f"{folder.name}/" for folder in folders)
            raise StrataViTError(f"data: {data} holds {both}, two names for one split; keep one of them there")
        if folders:
            return folders[0]
    return None


def unused_splits(data: str | Path, split: str, used: Path) -> list[str]:
    """Names of the folders that could have been this split, too."""
    found = _named(Path(data))
    return [path.name for names in SPLITS[split] for path in found.get(names[0], []) if path != used]


def split_folder(data: str | Path, split: str) -> Path:
    """Where the class folders of a split are; worth asking before a model is fetched.

    Raises:
        StrataViTError: There is no such folder, or there are two.
    """
    root = Path(data)
    if not root.is_dir():
        raise StrataViTError(f"data: {root} is not a folder; {_EXPECTED}")
    folder = find_split(root, split)
    if folder is None and _named(root):
        raise StrataViTError(f"data: {root} has no {split}/ folder, which is needed here; {_EXPECTED}")
    return folder or root


def _named(root: Path) -> dict[str, list[Path]]:
    """The folders that have names of splits, by kind."""
    found: dict[str, list[Path]] = {}
    try:
        for name in sorted(os.listdir(root)):
            kind = kind_of_split(name)
            if kind is not None and (root / name).is_dir():
                found.setdefault(kind, []).append(root / name)
    except OSError as error:
        raise StrataViTError(f"data: {root} cannot be read ({error.strerror})") from error
    return found
