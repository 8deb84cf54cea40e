"""Whether other programs take the processors that a model wants, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

CROWDED = 0.1  # share of their time that threads wait for a processor, from which on they wait for one another, too
_THREADS = Path("/proc/self/task")


def share_waited(run: Callable[[], Any]) -> float:
    """The share of their time that threads of this process wait for a processor while something runs.

    Threads that share a layer wait for one another at its end, so one that waits for a processor holds up all, and a
    pass takes as long as there are layers, not as there is work.

    Args:
        run: Called once.

    Returns:
        0 to 1; 0 where the system does not count it.
    """
    before = _counted()
    run()
    ran, waited = (now - then for now, then in zip(_counted(), before, strict=True))
    return max(waited, 0) / max(ran + waited, 1)


def _counted() -> tuple[int, int]:
    """Nanoseconds that all threads ran, and that they waited for a processor."""
    ran = waited = 0
    for file in _THREADS.glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            own = file.read_text().split()
            ran, waited = ran + int(own[0]), waited + int(own[1])
    return ran, waited
