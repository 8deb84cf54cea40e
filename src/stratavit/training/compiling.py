"""Passes with gradients that are compiled by `torch.compile`: a graph for each of a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import StrataViTError, one_line
from stratavit.spec import Spec
from stratavit.training.tracing import Followed, trace

BACKEND: Any = "inductor"  # of `torch.compile`


class CompiledSizes(nn.Module):
    """A network whose calls run compiled code, made at the first call of a size and used from then on.

    Args:
        network: A `SuperNet`, `finetune.Plain`, or either made to return a trace (`tracing.Followed`).
        mode: Of `torch.compile`; ``reduce-overhead`` records CUDA graphs.

    Attributes:
        graphs: Spec -> compiled pass.
    """

    def __init__(self, network: nn.Module, mode: str | None = None) -> None:
        super().__init__()
        self.network, self.mode = network, mode
        self.graphs: dict[Spec, Callable[..., Any]] = {}

    def forward(self, images: Tensor, spec: Mapping[str, int]) -> Any:
        """What the network makes of images ``[B, C, H, W]`` at a spec.

        Raises:
            StrataViTError: `torch.compile` fails here.
        """
        followed = isinstance(self.network, Followed)
        net: Any = self.network.net if followed else self.network
        key = Spec(spec)
        if key not in self.graphs:
            body = _own(_traced if followed else _run, f"size_{len(self.graphs)}")
            self.graphs[key] = torch.compile(body, backend=BACKEND, dynamic=False, mode=self.mode)
        try:
            with net.at(spec) as model:
                return self.graphs[key](model, images)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise StrataViTError(
                f"train: torch.compile fails here ({one_line(error)}); set compile_sizes to 0"
            ) from error


def _run(model: Any, images: Tensor) -> Any:
    return model(images)


def _traced(model: Any, images: Tensor) -> Any:
    return trace(model, images)


def _own(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function with code of its own: torch keeps graphs by code, and only a few of each."""
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
