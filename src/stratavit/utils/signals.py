"""SIGTERM and Ctrl-C: what has begun is tidied up or saved first, and the exit code says which of them it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands, as Python does for Ctrl-C."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a program that such a signal ended, as shells report it: 128 and its number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def raised() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` once, so that half-written files are removed; further ones are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def hush() -> None:
    """For worker processes: the thread that hands tensors over says nothing when their reader has gone meanwhile."""
    sys.excepthook = lambda *error: None  # its only use there: torch itself reports what a worker fails of
