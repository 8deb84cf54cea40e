"""The errors that a user can cause and fix."""

import errno
import os
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")


class StrataViTError(ValueError):
    """Bad input: one sentence that says what was wrong, what was expected and what to do."""


class UnsupportedModelError(StrataViTError):
    """The model has a part that StrataViT cannot cut; the message names the module and the reason."""


class ArtifactError(StrataViTError):
    """A file or folder cannot be read or written as asked."""


class BudgetError(StrataViTError):
    """The budget asked for cannot be met; the message names the reachable range."""


def one_line(error: BaseException) -> str:
    """What another library's error says, as part of one of our sentences: its first line, or its type."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])


def described(found: Any) -> str:
    """A value from a file, short enough for one of our sentences."""
    try:
        text = repr(found)
    except ValueError:  # a whole number of thousands of digits
        text = f"a very large {type(found).__name__}"
    return text if len(text) <= 60 else text[:60] + "..."


def shown(name: str, longest: int = 200) -> str:
    """A name from a file as it is, or without what would break or fill our line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)[:longest]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, in torch on any device, or in the system."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """Why something could not be read or written: what the system said, of which some libraries keep a part only."""
    found: BaseException | None = error
    while found is not None:
        if getattr(found, "errno", None) in _FULL or "No space left on device" in str(found):
            return f"the disk is full ({os.strerror(getattr(found, 'errno', None) or errno.ENOSPC)})"
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return "memory ran out" if out_of_memory(error) else one_line(error)
