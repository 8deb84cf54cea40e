"""What recovery of all sizes learns of a module: a change of its weights that grows as the module becomes narrower.

At width w of W the weights are those that follow from the full ones, plus ``(1 - w / W)`` times the first w channels of
the change. So nothing that is learned touches the full size: it stays the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stratavit.utils.model import temporarily

if TYPE_CHECKING:
    from stratavit.elastic.base import ElasticSite, Weights

NAMES = ("in_weight", "in_bias", "out_weight", "out_bias")


class Delta(nn.Module):
    """The change of a module's weights, at full width and in the form of `base.Weights`; zero at first.

    Its tensors are buffers that no state dict has, so that a super-network's stays an ordinary timm checkpoint. Inside
    of `learning` they are parameters, and state dicts have them.

    Args:
        full: The module's weights at full width.
    """

    def __init__(self, full: Weights) -> None:
        super().__init__()
        for name, tensor in zip(NAMES, full, strict=True):
            like = full.out_weight[:, 0] if tensor is None and name == "out_bias" else tensor  # cuts have a bias there
            zeros = None if like is None else torch.zeros_like(like, memory_format=torch.contiguous_format).detach()
            self.register_buffer(name, zeros, persistent=False)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The tensors in the order of `NAMES`."""
        return tuple(getattr(self, name) for name in NAMES)

    def become(self, parameters: bool, like: Weights | None = None) -> None:
        """Makes the tensors parameters, or buffers again.

        Args:
            parameters: Which of the two.
            like: Weights of the module. A parameter learns if they do; a relative rate refers to their size, see
                `training.optimizer.rate_scale`.
        """
        for number, (name, tensor) in enumerate(zip(NAMES, self.parts(), strict=True)):
            if tensor is None:
                continue
            delattr(self, name)
            if not parameters:
                self.register_buffer(name, tensor.detach(), persistent=False)
                continue
            weights = None if like is None else like[number]
            learned = nn.Parameter(tensor.detach(), weights is None or weights.requires_grad)
            learned.changes = None if weights is None else weights.detach()  # type: ignore[attr-defined]
            self.register_parameter(name, learned)


def added(tensor: Tensor | None, share: float, change: Tensor | None) -> Tensor | None:
    """``tensor + share * change``, where both are there; in the type of the tensor."""
    return tensor if tensor is None or change is None else tensor + (share * change).to(tensor.dtype)


def settle(elastic: Mapping[str, ElasticSite]) -> None:
    """Makes changes that learn a part of their modules for good; see `learning_deltas`."""
    for module in elastic.values():
        if module.delta is not None:
            module.delta.become(False)


@contextmanager
def learning_deltas(model: nn.Module, elastic: Mapping[str, ElasticSite]) -> Iterator[None]:
    """Inside, changes of the modules' weights are all that learns; those of modules that had none begin with zero."""
    others = list(model.parameters())
    with ExitStack() as stack:
        stack.callback(settle, elastic)
        for module in elastic.values():
            full = module.weights_at(module.full_width)
            module.delta = module.delta or Delta(full)
            module.delta.become(True, full)
        stack.enter_context(temporarily("requires_grad", dict.fromkeys(others, False)))
        yield
