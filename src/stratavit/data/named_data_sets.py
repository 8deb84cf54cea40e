"""Data sets by name, read by Hugging Face's datasets: ``hfds/NAME``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stratavit.data.image_files import some
from stratavit.data.splits import kind_of_split
from stratavit.errors import StrataViTError, one_line

PREFIX = "hfds/"  # as in timm


def is_named(data: Any) -> bool:
    """Whether it is a text that begins with ``hfds/``."""
    return isinstance(data, str) and data.casefold().startswith(PREFIX)


def load_named(data: str) -> Any:
    """A data set of the hub or of a folder: its training split, or the only split.

    timm's reader of these needs labels; this one does not.

    Args:
        data: ``hfds/NAME``, the name as for ``datasets.load_dataset``, or a folder that ``save_to_disk`` wrote.

    Raises:
        StrataViTError: datasets is not installed, there is no such data set, or nothing says which split.
    """
    name = data[len(PREFIX) :]
    try:
        import datasets
    except ImportError as error:
        raise StrataViTError(f"data: {data} is read by datasets: pip install 'stratavit[datasets]'") from error
    saved = any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            return one_split(datasets.load_from_disk(name))
        split = which_split(datasets.get_dataset_split_names(name))  # so that no other split is fetched
        return datasets.load_dataset(name, split=split)
    except StrataViTError:
        raise
    except Exception as error:  # they differ by place, format and release
        raise StrataViTError(
            f"data: datasets cannot load {name!r} ({one_line(error)}); give the name of a data set of images, or load "
            "it in Python and pass the data set"
        ) from error


def one_split(data: Any) -> Any:
    """The training split of a mapping of several, or the only one; a data set as it is."""
    return data[which_split(data)] if isinstance(data, Mapping) else data


def which_split(names: Iterable[Any]) -> Any:
    """The name of the training split, or the only name.

    Raises:
        StrataViTError: There are several others, or none.
    """
    found = list(names)
    training = [name for name in found if kind_of_split(str(name)) == "train"]
    if len(training or found) != 1:
        raise StrataViTError(
            f"data: the data set has the splits {some(map(str, found)) or 'none'}, and nothing says which to use; pass "
            "one of them in Python"
        )
    return (training or found)[0]
