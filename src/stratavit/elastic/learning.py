"""Changes of weights that learn, see `delta`: parameters for as long as they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.delta import Delta
from stratavit.utils.model import temporarily


def settle(elastic: Mapping[str, ElasticSite]) -> None:
    """Makes changes that learn a part of their modules for good; see `learning_deltas`."""
    for module in elastic.values():
        if module.delta is not None:
            module.delta.settle()


@contextmanager
def learning_deltas(model: nn.Module, elastic: Mapping[str, ElasticSite]) -> Iterator[None]:
    """Inside, changes of the modules' weights are all that learns; those of modules that had none begin with zero."""
    others = list(model.parameters())
    with ExitStack() as stack:
        stack.callback(settle, elastic)
        for module in elastic.values():
            full = module.weights_at(module.full_width)
            module.delta = module.delta or Delta(full)
            module.delta.learn(full)
        stack.enter_context(temporarily("requires_grad", dict.fromkeys(others, False)))
        yield
