"""At which widths a call runs: a context variable, so that every thread and every asyncio task has its own.

Nothing of it is state of the modules: two threads that run one network at two sizes cannot disturb each other, and a
call that ends leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Run:
    """What modules run at. Modules that are not named run at full width, as computed from their own weights.

    Attributes:
        widths: Elastic module -> kept width.
        fixed: Elastic module -> weight and bias of its second map, computed once for all of the run.
        shifts: Hook of a last norm -> what it adds, ``[C]``.
        tokens: Block -> patch tokens that it passes on, see `token_places.TokenPlace`; None for all.
    """

    widths: Mapping[Any, int] = field(default_factory=dict)
    fixed: Mapping[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shifts: Mapping[Any, Tensor | None] = field(default_factory=dict)
    tokens: Mapping[Any, int | None] = field(default_factory=dict)


_FULL = Run()
_RUNNING: ContextVar[Run] = ContextVar("stratavit_run", default=_FULL)


def current_run() -> Run:
    """What the modules of this thread or task run at."""
    return _RUNNING.get()


@contextmanager
def running(run: Run) -> Iterator[None]:
    """The modules that a run names run as it says inside; those of other networks as outside."""
    outer = _RUNNING.get()
    fixed = {module: pair for module, pair in outer.fixed.items() if module not in run.widths}
    widths, shifts = {**outer.widths, **run.widths}, {**outer.shifts, **run.shifts}
    token = _RUNNING.set(Run(widths, {**fixed, **run.fixed}, shifts, {**outer.tokens, **run.tokens}))
    try:
        yield
    finally:
        _RUNNING.reset(token)
