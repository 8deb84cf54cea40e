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
        part: What the first loop to come is worth, in an `overall` job.
    """

    def __init__(self, description: str, total: float | None, silent: bool = False) -> None:
        self.description, self.total, self.done, self.part = description, total, 0.0, 0.0
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
    display, begun = _Display(description, total, silent), [0.0]

    def begin(work: float) -> None:
        display.move(sum(begun))
        display.part = work
        begun.append(work)

    token = _OVERALL.set(display)
    try:
        yield begin
    finally:
        _OVERALL.reset(token)
        display.close()
