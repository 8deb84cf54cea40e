"""The elastic modules of a network: found by name, and run together at widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.running import Run, running
from stratavit.elastic.solving import fixed_outs
from stratavit.errors import StrataViTError


def site_of(model: nn.Module, name: str) -> ElasticSite:
    """The elastic module of a name.

    Raises:
        StrataViTError: The owner of the super-network has taken it out, or put another one in its place.
    """
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part, None)
    if not isinstance(module, ElasticSite):
        raise StrataViTError(
            f"{name} of this super-network was taken out of its model or replaced; undo it, or change the model before "
            "SuperNet(model)"
        )
    return module


def sites_in(model: nn.Module) -> dict[str, ElasticSite]:
    """Name -> elastic module, of all that a model has."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ElasticSite)}


@contextmanager
def run_at(
    elastic: Mapping[str, ElasticSite],
    widths: Mapping[str, int] | None,
    fixed: bool = False,
    shifts: Mapping[Any, Tensor | None] | None = None,
    tokens: Mapping[Any, int | None] | None = None,
) -> Iterator[None]:
    """The sites run at these widths (None: full) inside, in this thread or task alone; `shifts`, `tokens` see `Run`.

    With `fixed`, no weight changes inside and none gets a gradient, so that compensated weights are computed once.
    """
    chosen = {module: module.full_width if widths is None else widths[name] for name, module in elastic.items()}
    known = fixed_outs(chosen) if fixed else {}
    with running(Run(chosen, known, shifts or {}, tokens or {})):
        yield
