"""The errors a user can cause and mend."""

from typing import Any


class StrataViTError(ValueError):
    """Bad input: one sentence that says what was wrong, what was expected and what to do."""


class UnsupportedModelError(StrataViTError):
    """The model has a part that StrataViT cannot cut; the message names the module and the reason."""


class ArtifactError(StrataViTError):
    """A file or folder cannot be read or written as asked."""


class BudgetError(StrataViTError):
    """The budget asked for cannot be met; the message names the reachable range."""


def one_line(error: BaseException, longest: int = 200) -> str:
    """What another library's error says, as part of one of our sentences: its first line, or its type."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:longest]


def described(found: Any, longest: int = 60) -> str:
    """A value from a file, short enough for one of our sentences."""
    try:
        text = repr(found)
    except ValueError:  # a whole number of thousands of digits
        text = f"a very large {type(found).__name__}"
    return text if len(text) <= longest else text[:longest] + "..."
