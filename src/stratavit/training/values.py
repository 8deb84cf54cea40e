"""Values of a recipe: the ranges that they may have, and the file that they are read from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from stratavit.errors import StrataViTError, described, one_line
from stratavit.files.reading import read_small

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover: Python 3.10, as in `make test-matrix`
    import tomli as tomllib

_NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("at least 0", lambda value: value >= 0)
Whole = Annotated[int, _NOT_NEGATIVE]
Count = Annotated[int, ("at least 1", lambda value: value >= 1)]
Amount = Annotated[float, _NOT_NEGATIVE]
Rate = Annotated[float, ("at least 0 and below 1", lambda value: 0 <= value < 1)]
Share = Annotated[float, ("above 0 and at most 1", lambda value: 0 < value <= 1)]
Probability = Annotated[float, ("from 0 to 1", lambda value: 0 <= value <= 1)]
_LARGEST = 2**32  # of any number: seeds go as far


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file; a `StrataViTError` says why it cannot be read."""
    try:
        return tomllib.loads(read_small(path).decode())
    except OSError as error:
        raise StrataViTError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of a number of thousands of digits, too
        raise StrataViTError(f"recipe {path}: not valid TOML ({one_line(error)})") from error


def check(sound: bool, message: str) -> None:
    """Raises a StrataViTError with this message unless something is sound."""
    if not sound:
        raise StrataViTError(message)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Checks the type of a value, and the size of a number."""
    if get_origin(kind) is Literal:
        sound, words = isinstance(value, str) and value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    else:
        sound = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        words = {int: "a whole number", float: "a number", str: "a text"}[kind]
    check(sound, f"{name} must be {words}, got {described(value)}")
    if kind in (int, float):
        check(abs(value) <= _LARGEST, f"{name} must be finite and at most {_LARGEST:,}, got {described(value)}")
