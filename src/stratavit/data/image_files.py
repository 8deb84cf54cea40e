"""The images of a folder: a class is the folder directly below it, however deep its images lie."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

from stratavit.data.image_reading import endings
from stratavit.data.splits import kind_of_split, looks_like_split, split_at_the_end
from stratavit.errors import StrataViTError, shown

_TOOLS = {"@eadir", "__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found"}


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        samples: Path and class folder of every image, in natural order of the paths.
        inner: Class folder -> names of the folders in it.
        splits: Folder that holds splits of two kinds, at any depth -> names of the folders in it.
        hidden: Names of hidden and tool folders and files, which are left out.
        passed: Ending -> number of files that Pillow does not decode.
        loose: Images next to the class folders, which are of no class.
        files: Names of other files next to the class folders.
    """

    folder: Path
    samples: list[tuple[str, str]] = field(default_factory=list)
    inner: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    loose: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Class folders with images, in natural order."""
        return in_natural_order({label for _, label in self.samples})

    def notes(self) -> list[str]:
        """What was left out, a sentence each."""
        empty, said = in_natural_order(set(self.inner) - set(self.classes)), []
        if self.hidden:
            said.append(f"left out {len(self.hidden)} hidden or tool folders and files ({some(self.hidden)})")
        if self.passed:
            count = sum(self.passed.values())
            said.append(f"passed over {count} files whose endings are not of images ({_counted(self.passed)})")
        if empty:
            said.append(f"{len(empty)} class folders hold no images and are not classes ({some(empty)})")
        if self.loose:
            said.append(f"left out {len(self.loose)} images that lie in no class folder, first {min(self.loose)}")
        return [f"{self.folder}: {text}" for text in said]


def list_images(folder: Path, bare: bool = False) -> Listing:
    """Finds the images of a folder; links to other folders are followed.

    Args:
        folder: Holds one folder of images per class.
        bare: It is not a split of a data set, so that a folder in it may be one by mistake.

    Raises:
        StrataViTError: No images in class folders; folders that hold splits or wait to be sorted by a list; a folder
            cannot be read, or a link leads back to a folder that holds it, so that images would be found many times.
    """
    found, read = Listing(folder), endings()
    for path, parts in _walk(str(folder), (), found):
        ending = _ending(path)
        if ending in read:
            if parts:
                found.samples.append((path, parts[0]))
            else:
                found.loose.append(path)
        else:
            found.passed[ending] += 1
            found.files += [] if parts else [os.path.basename(path)]
    found.samples.sort(key=lambda sample: (_natural_key(sample[0]), sample[0]))
    if not found.samples:
        raise StrataViTError(f"{folder} holds no usable images: {_reason(found)}")
    _check_depth(found, bare)
    return found


def all_images(folder: Path) -> Listing:
    """Finds the images of a folder, however deep they lie, all of one nameless class; see `list_images`.

    Raises:
        StrataViTError: There are none, a folder in it holds splits, or one cannot be read.
    """
    found, read = Listing(folder), endings()
    for path, _ in _walk(str(folder), (), found):
        if _ending(path) in read:
            found.samples.append((path, ""))
        else:
            found.passed[_ending(path)] += 1
    found.samples.sort(key=lambda sample: (_natural_key(sample[0]), sample[0]))
    if not found.samples:
        raise StrataViTError(f"data: {folder} holds no images in a format that Pillow reads; give a folder of images")
    _check_splits(found)
    _check_endings(found)
    return found


def class_folders(folder: Path) -> list[str]:
    """The class folders with images of a folder in natural order, without looking at every image.

    Raises:
        StrataViTError: A folder cannot be read.
    """
    read, aside = endings(), Listing(folder)
    _, names, _ = next(os.walk(folder, onerror=_refuse))
    inside = {name: _walk(os.path.join(folder, name), (name,), aside) for name in names if not is_aside(name)}
    return in_natural_order(name for name, files in inside.items() if any(_ending(path) in read for path, _ in files))


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names with the numbers in them counted, 2 before 10, and letters in any case alike; as timm orders them."""
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(text: str) -> list[Any]:
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text.lower()))]


def _walk(top: str, parts: tuple[str, ...], found: Listing) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every file below a folder that is not left out, with the names of the folders on the way to it."""
    # folder -> names on the way to it, and real paths of the folders that hold it
    ways: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {top: (parts, ())}
    for path, names, files in os.walk(top, followlinks=True, onerror=_refuse):
        (parts, above), real = ways.pop(path), os.path.realpath(path)
        if real in above:
            raise StrataViTError(f"data: {path} is a link to a folder that holds it; take it out")
        found.hidden += filter(is_aside, (*names, *files))
        names[:] = [name for name in names if not is_aside(name)]  # the others are not walked
        ways |= {os.path.join(path, name): ((*parts, name), (*above, real)) for name in names}
        if parts and len({kind_of_split(name) for name in names} - {None}) > 1:
            found.splits[path] = list(names)
        for name in names:
            if len(parts) < 2:
                found.inner.setdefault(parts[0] if parts else name, []).extend([name] if parts else [])
        yield from ((os.path.join(path, name), parts) for name in files if not is_aside(name))


def _refuse(error: OSError) -> NoReturn:
    raise StrataViTError(f"data: {error.filename or 'a folder'} cannot be read ({error.strerror})") from error


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def is_aside(name: str) -> bool:
    """Whether a file or folder of this name is left out: hidden ones, and those of tools."""
    return name.startswith(".") or name.casefold() in _TOOLS


def _check_depth(found: Listing, bare: bool) -> None:
    """Refuses folders that are not classes, as far as names can tell."""
    folder, classes = found.folder, found.classes
    _check_splits(found)
    for name, inner in found.inner.items():
        only = len(classes) == 1 and any(map(kind_of_split, inner))
        if bare and inner and (only or looks_like_split(name)):
            raise StrataViTError(
                f"data: {folder / name} looks like a split or a data set, not like a class (it holds "
                f"{some(f'{inside}/' for inside in inner)}); give that folder, or rename it to train or val"
            )
    if bare:
        _check_endings(found)
    lists = [name for name in found.files if "annotation" in name.casefold()]
    if len(classes) == 1 and lists:
        raise StrataViTError(
            f"data: {folder} holds all images in one folder, {classes[0]}, and {lists[0]}; expected "
            "<class>/<image>: sort the images into class folders by that file"
        )


def _check_splits(found: Listing) -> None:
    """Refuses folders that hold splits: what is to be measured on would be calibrated on."""
    for path, inner in found.splits.items():
        raise StrataViTError(
            f"data: {path} holds {some(f'{inside}/' for inside in inner)}, which are splits, not images of one class; "
            f"give that folder, or put the splits above the classes, such as train/{os.path.basename(path)}"
        )


def _check_endings(found: Listing) -> None:
    """Refuses splits whose names say so at their end, such as ``flowers_train`` and ``flowers_val``."""
    ends = [(name, *end) for name, inner in found.inner.items() if inner and (end := split_at_the_end(name))]
    for (one, stem, kind), (other, other_stem, other_kind) in combinations(ends, 2):
        if stem == other_stem and kind != other_kind:
            raise StrataViTError(
                f"data: {found.folder} holds {one}/ and {other}/, which look like splits, not like classes; rename "
                f"them to {kind} and {other_kind}"
            )


def _reason(found: Listing) -> str:
    if found.loose:
        return (
            f"expected <class>/<image>, found {len(found.loose)} images in no class folder; if {found.folder.name} is "
            "a class, give a folder that holds the class folders, such as one named train or val"
        )
    if found.passed:
        return f"expected <class>/<image> in a format that Pillow reads, found others only ({_counted(found.passed)})"
    return "expected <class>/<image>"


def some(names: Iterable[str], most: int = 5) -> str:
    """A few of these names, for a sentence."""
    different = list(dict.fromkeys(names))
    return ", ".join(shown(name, 60) for name in different[:most]) + (", ..." if len(different) > most else "")


def _counted(passed: Counter[str]) -> str:
    return some(f"{ending or 'no ending'} {count}" for ending, count in passed.most_common())
