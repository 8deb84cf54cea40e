"""Progress bars: on standard error, and only where a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterates over `items` behind a progress bar; plain iteration when standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
