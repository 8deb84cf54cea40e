"""Which folder of a data set is trained on, and which one is measured on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stratavit.errors import StrataViTError

SPLITS = {"train": (("train", "training"),), "val": (("val", "valid", "validation"), ("test", "testing"))}
_KIND = {name: names[0] for groups in SPLITS.values() for names in groups for name in names}
_LIKE = re.compile(rf"({'|'.join(sorted(_KIND, key=len, reverse=True))}|dev|eval)($|[^a-z])")
_ENDS = re.compile(rf"(.+)[_\- .]({'|'.join(sorted(_KIND, key=len, reverse=True))})$")
_EXPECTED = "expected train/ and val/ with one folder of images per class"


def kind_of_split(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for a usual name of a split in any upper and lower case; else None."""
    return _KIND.get(name.casefold())


def looks_like_split(name: str) -> bool:
    """Whether a folder's name begins as that of a split, such as ``test_set``."""
    return _LIKE.match(name.casefold()) is not None


def split_at_the_end(name: str) -> tuple[str, str] | None:
    """What stands before a usual name of a split at the end of a folder's name, and its kind: ``flowers_train``."""
    found = _ENDS.match(name.casefold())
    return None if found is None else (found[1], _KIND[found[2]])


def find_split(data: str | Path, split: str) -> Path | None:
    """The folder of a split, ``train`` or ``val``, in a data set; None without one.

    Of ``val`` it is val/ (valid/, validation/), or else test/ (testing/).

    Raises:
        StrataViTError: There are two folders for one split; they are never merged, and neither is guessed.
    """
    candidates = _candidates(data, split)
    same = [path for path in candidates if kind_of_split(path.name) == kind_of_split(candidates[0].name)]
    if len(same) > 1:
        both = " and ".join(f"{path.name}/" for path in same)
        raise StrataViTError(f"data: {data} holds {both}, two names for one split; keep one of them there")
    return candidates[0] if candidates else None


def unused_splits(data: str | Path, split: str, used: Path) -> list[str]:
    """Names of the other folders that could have been this split, too."""
    return [path.name for path in _candidates(data, split) if path != used]


def split_folder(data: str | Path, split: str) -> Path:
    """Where the class folders of a split are: its folder, or the data set itself if it has no splits.

    Raises:
        StrataViTError: There is no such folder, or there are two.
    """
    root = Path(data)
    if not root.is_dir():
        raise StrataViTError(f"data: {root} is not a folder; {_EXPECTED}")
    folder = find_split(root, split)
    if folder is None and any(_candidates(root, name) for name in SPLITS):
        raise StrataViTError(f"data: {root} has no {split}/ folder, which is needed here; {_EXPECTED}")
    return folder or root


def _candidates(data: str | Path, split: str) -> list[Path]:
    """The folders that have a name of the split, the preferred ones first."""
    try:
        names = sorted(name for name in os.listdir(data) if Path(data, name).is_dir())
    except OSError as error:
        raise StrataViTError(f"data: {data} cannot be read ({error.strerror})") from error
    return [Path(data, name) for usual in SPLITS[split] for name in names if name.casefold() in usual]
