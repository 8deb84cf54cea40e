"""Which class a folder of images is: by a class map, by the model's own names, by the training split, or by order."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from stratavit.data.image_files import some
from stratavit.errors import StrataViTError, described
from stratavit.files.reading import read_small
from stratavit.utils.model import classes_of, is_super_network

MEND = "give --class-map FILE (one class folder name per line)"


@dataclass(frozen=True)
class Numbering:
    """Class folders and their numbers.

    Attributes:
        names: Of all classes, by number.
        index: Class folder -> number.
        how: What the numbers follow, for people.
        positions: Whether they follow nothing but the order of folders.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    how: str
    positions: bool = False


def class_names_of(model: Any) -> list[str] | None:
    """The names of a model's classes in the order of its head, for `image_loader`; None if it has none.

    They are ``id2label`` of a model that came from transformers, or ``label_names`` of timm's ``pretrained_cfg``.
    Placeholders (``LABEL_0``) do not count, nor do more or fewer names than the head has classes.

    Args:
        model: A model of timm or transformers, a small model, or a super-network.

    Returns:
        One name per class, or None.
    """
    inner: Any = model.model if is_super_network(model) else model
    cfg, origin = getattr(inner, "pretrained_cfg", None) or {}, getattr(model, "origin", None) or {}
    cfg = cfg if isinstance(cfg, Mapping) else vars(cfg)
    labels = getattr(getattr(inner, "config", None), "id2label", None)
    for given in (cfg.get("label_names"), labels, (origin.get("config") or {}).get("id2label")):
        names = _in_order(given)
        placeholders = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
        if not placeholders and len(names) == classes_of(model):
            return names
    return None


def set_class_names(model: Any, names: Sequence[str]) -> None:
    """Names the classes of a timm model or a `SuperNet`, in place of the names that it had."""
    inner = model.model if is_super_network(model) else model
    inner.pretrained_cfg = {**(getattr(inner, "pretrained_cfg", None) or {}), "label_names": list(names)}
    origin = getattr(inner, "origin", None)
    if origin:
        labels = {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }
        inner.origin = {**origin, "config": {**origin["config"], **labels}}
        model.origin = inner.origin


def full_names(folders: Sequence[str], known: Sequence[str] | None = None) -> list[str]:
    """Names to keep of classes: those of their folders, and after a comma what is known to people.

    `numbered` finds a class by either.

    Args:
        folders: Names of class folders, by number.
        known: Names that the model had; None: of folders called by WordNet's numbers, what ImageNet calls them.
    """
    return [_full(name, more) for name, more in zip(folders, known or _of_wordnet(folders), strict=True)]


def _full(name: str, more: str) -> str:
    called = _plain(name) in (_plain(more), *(_plain(part) for part in more.split(",")))
    return more if called else f"{name}, {more}" if more else name


def _of_wordnet(names: Sequence[str]) -> list[str]:
    """What WordNet's numbers (n01440764) stand for; nothing of any other name."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return [""] * len(names)
    known = ImageNetInfo().label_descriptions(as_dict=True)
    return [known.get(name, "") for name in names]


def _in_order(given: Any) -> list[str]:
    """Names from a sequence, or from a mapping of their numbers, which JSON makes texts; none of anything else."""
    if isinstance(given, Mapping):
        numbered = {str(key): name for key, name in given.items()}
        given = [numbered.get(str(index)) for index in range(len(given))]
    fit = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    return list(given) if fit else []


def read_class_map(path: Path) -> dict[str, int]:
    """Class folder name -> index from a text file of one name per line; names are `composed`.

    Raises:
        StrataViTError: The file is not readable text, is empty, or names a class twice.
    """
    try:
        text = composed(read_small(path).decode("utf-8-sig"))  # Windows puts a mark in front
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StrataViTError(f"class map {path}: cannot be read as text, one class folder name per line") from error
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated or not names:
        what = f"{described(repeated[0])} appears twice" if repeated else "is empty"
        raise StrataViTError(f"class map {path}: {what}")
    return {name: index for index, name in enumerate(names)}


def numbered(
    folder: Path,
    found: Sequence[str],
    class_map: str | Path | None,
    names: Sequence[str] | None,
    train: Callable[[], Sequence[str]] | None,
    classes: int | None,
) -> Numbering:
    """The numbers of class folders, see `image_loader`.

    Args:
        folder: For messages.
        found: Its class folders, in natural order.
        names: Of the model's classes.
        train: Lists the class folders of the training split; None if this is it, or there is none.
        classes: Of the model's head; None or 0: any.

    Raises:
        StrataViTError: The folders do not match what numbers them.
    """
    if class_map is not None:
        return _by_class_map(folder, found, class_map)
    named = _by_names(folder, found, names) if names else None
    return named or _by_order(folder, found, train() if train else found, classes, unmatched=bool(names))


def all_named(folder: Path, found: Sequence[str], names: Sequence[str] | None) -> bool:
    """Whether class folders, some or all of the classes, are called by the names of a model's classes."""
    try:
        return bool(names) and _by_names(folder, found, names or ()) is not None
    except StrataViTError:  # not all, or two by one name
        return False


def _by_class_map(folder: Path, found: Sequence[str], path: str | Path) -> Numbering:
    known = read_class_map(Path(path))
    index = {name: known[composed(name)] for name in found if composed(name) in known}
    unknown = [name for name in found if name not in index]
    if not index:
        raise StrataViTError(f"{folder} holds no usable images: none of its class folders is in the class map")
    if unknown:
        raise StrataViTError(f"{folder / unknown[0]} is not a class of {path} ({len(unknown)} such folders)")
    return Numbering(tuple(known), index, f"by {Path(path).name}")


def _by_names(folder: Path, found: Sequence[str], names: Sequence[str]) -> Numbering | None:
    """By the model's class names, or one of several that commas part, whatever their case; None if none fits."""
    levels = [_indexed([name] for name in names), _indexed([_plain(name)] for name in names)]
    levels.append(_indexed([_plain(part) for part in name.split(",")] for name in names))
    index: dict[str, int] = {}
    for name in found:
        keys = (name, _plain(name), _plain(name))
        hits = next((level[key] for level, key in zip(levels, keys, strict=True) if key in level), [])
        if len(hits) > 1:
            raise StrataViTError(
                f"data: {folder / name}: the model has {len(hits)} classes of that name, numbers "
                f"{some(map(str, hits))}; {MEND}"
            )
        if hits:
            index[name] = hits[0]
    if not index:
        return None
    odd = [name for name in found if name not in index]
    if odd:
        raise StrataViTError(
            f"data: {folder}: {len(odd)} class folders ({some(odd)}) have no name of the model's classes, while "
            f"{len(index)} have ({some(index)}); rename them or take them out, or {MEND}"
        )
    number, count = Counter(index.values()).most_common(1)[0]
    if count > 1:
        both = " and ".join(name for name in index if index[name] == number)
        raise StrataViTError(f"data: {folder}: {both} are both called as the model's class {number}; {MEND}")
    return Numbering(tuple(names), index, "by the model's class names")


def _by_order(
    folder: Path, found: Sequence[str], train: Sequence[str], classes: int | None, unmatched: bool
) -> Numbering:
    """By natural order in the training split; refused if it has other classes and the head does not decide."""
    how = "in natural order of the class folders" + (", none of which the model names" if unmatched else "")
    missing, extra = [name for name in found if name not in train], [name for name in train if name not in found]
    names = train
    if not missing and extra and (not classes or len(train) == classes):
        how += f" of the training split, {len(extra)} of which are not here ({some(extra)})"
    elif missing and not extra and len(found) == classes:
        how += f", {len(missing)} of which the training split lacks ({some(missing)})"
        names = found
    elif missing or extra:
        lacks = [f"{some(missing)} is not among the class folders of the training split"] if missing else []
        more = [f"{some(extra)} is there to train on only"] if extra else []
        head = f", and the model's head has {classes} classes" if classes else ""
        raise StrataViTError(
            f"data: {folder}: class folders differ, {' and '.join(lacks + more)}{head}; take out what is not a class, "
            f"or {MEND}"
        )
    return Numbering(tuple(names), {name: index for index, name in enumerate(names)}, how, positions=True)


def other_order(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names, the first of which comes before the second here and after it where letters decide; None if none."""
    return next(((ours, other) for ours, other in zip(names, sorted(names), strict=True) if ours != other), None)


def _indexed(named: Iterable[list[str]]) -> dict[str, list[int]]:
    """Name -> numbers of the classes that have it among theirs."""
    found: dict[str, list[int]] = {}
    for index, names in enumerate(named):
        for name in set(names):
            found.setdefault(name, []).append(index)
    return found


def composed(name: str) -> str:
    """Letters with their accents in one: macOS writes them apart, so that names differ which look alike."""
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return " ".join(composed(name).replace("_", " ").split()).casefold()
