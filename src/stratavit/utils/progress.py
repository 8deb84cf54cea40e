"""How far a long loop is: a bar on a terminal, now and then a line elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
FIRST_LINE, LONGEST_PAUSE = 5.0, 60.0  # seconds until the first line, and between lines, which become rarer


class _Display:
    """One bar, or lines.

    Attributes:
        done: Work done, in the unit of the total.
        begun: Work of the parts that have begun, in an `overall` job.
        part: What the first loop to come is worth there.
    """

    def __init__(self, description: str, total: float | None, silent: bool = False) -> None:
        self.description, self.total = description, total
        self.done, self.begun, self.part = 0.0, 0.0, 0.0
        self.started, self.pause, self.silent = time.monotonic(), FIRST_LINE, silent
        self.next_line = self.started + self.pause
        self.bar: Progress | None = None
        if sys.stderr.isatty() and not silent:
            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(description, total=total)
            self.bar.start()

    def move(self, done: float) -> None:
        """Shows that so much is done."""
        self.done = done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif now >= self.next_line and not self.silent:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            self.next_line = now + self.pause
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def begin(self, work: float | None = None, left: float | None = None) -> None:
        """A part of an `overall` job begins, see `begin_part`."""
        if work is None:
            work = max((self.total or 0.0) - self.begun, 0.0)
        if left is not None:
            self.total = self.begun + work + left
            if self.bar is not None:
                self.bar.update(self.task, total=self.total)
        self.move(self.begun)
        self.part = work
        self.begun += work

    def line(self, seconds: float) -> str:
        """What is said off a terminal after so many seconds."""
        if not self.total or not self.done:
            return f"{self.description}: {self.done:g} done in {seconds:.0f} s"
        left = seconds * (self.total - self.done) / self.done
        return f"{self.description}: {self.done / self.total:.0%}, about {left:.0f} s left"

    def moved(self, items: Iterable[T], step: float) -> Iterator[T]:
        """The items; each that was used moves the display by a step."""
        start = self.done
        for number, item in enumerate(items, start=1):
            yield item
            self.move(start + number * step)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()


_OVERALL: ContextVar[_Display | None] = ContextVar("overall", default=None)


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterates over `items` and shows how far it is.

    In an `overall` job the first loop of every part moves the display of the job, and other loops show nothing.
    """
    outer, total = _OVERALL.get(), len(items) if isinstance(items, Sized) else None
    if outer is None:
        display = _Display(description, total)
        try:
            yield from display.moved(items, 1.0)
        finally:
            display.close()
    elif outer.part and total:
        part, outer.part = outer.part, 0.0
        yield from outer.moved(items, part / total)
    else:
        yield from items


def begin_part(work: float | None = None, left: float | None = None) -> None:
    """Says in a job that is shown by `overall` that a part begins; elsewhere it does nothing.

    Args:
        work: What the part is worth, in the unit of the job's total; all that is left if None.
        left: Work after this part, if that is known better now than when the job began.
    """
    display = _OVERALL.get()
    if display is not None:
        display.begin(work, left)


def say(text: str) -> None:
    """Prints a line on standard error, unless it happens in a job that shows nothing."""
    outer = _OVERALL.get()
    if outer is None or not outer.silent:
        print(text, file=sys.stderr)


@contextmanager
def overall(description: str, total: float, silent: bool = False) -> Iterator[Callable[[float], None]]:
    """One display for a job of several parts, each of them a loop, or some.

    Args:
        description: Title of the job.
        total: Work in all, in any unit.
        silent: Show nothing, not even of the loops.

    Yields:
        To be called where a part begins, with the work that it is worth. A job inside another one shows nothing.
    """
    if _OVERALL.get() is not None:
        yield lambda work: None
        return
    display = _Display(description, total, silent)
    token = _OVERALL.set(display)
    try:
        yield display.begin
    finally:
        _OVERALL.reset(token)
        display.close()
