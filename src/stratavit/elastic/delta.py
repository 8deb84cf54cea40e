"""What recovery of all sizes learns of a module: a change of its weights that grows as the module becomes narrower.

At width w of W the weights are those that follow from the full ones, plus ``(1 - w / W)`` times the first w channels of
the change. So nothing that is learned touches the full size: it stays the source.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """What a module computes with at some width: into its channels, then out of them."""

    in_weight: Tensor  # attention [3*H*w, C] (v alone where q and k stay uncut: [H*w, C]), MLP [w, C] (gated [2*w, C])
    in_bias: Tensor | None
    out_weight: Tensor  # attention [C, H*w], MLP [C, w]
    out_bias: Tensor | None


class Delta(nn.Module):
    """The change of a module's weights, at full width and in the form of `Weights`; zero at first.

    Its tensors are buffers that no state dict has, so that a super-network's stays an ordinary timm checkpoint. While
    they learn (`learning.learning_deltas`) they are parameters, and state dicts have them.

    Args:
        full: The module's weights at full width.
    """

    def __init__(self, full: Weights) -> None:
        super().__init__()
        for name, tensor in zip(Weights._fields, full, strict=True):
            like = full.out_weight[:, 0] if tensor is None and name == "out_bias" else tensor  # cuts have a bias there
            zeros = None if like is None else torch.zeros_like(like, memory_format=torch.contiguous_format).detach()
            self.register_buffer(name, zeros, persistent=False)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The tensors in the order of `Weights`."""
        return tuple(getattr(self, name) for name in Weights._fields)

    def learn(self, full: Weights) -> None:
        """Makes the tensors parameters.

        Args:
            full: Weights of the module. A parameter learns if they do; a relative rate refers to their size, see
                `training.optimizer.rate_scale`.
        """
        for name, tensor, weights in zip(Weights._fields, self.parts(), full, strict=True):
            if tensor is None:
                continue
            learned = nn.Parameter(tensor.detach(), weights is None or weights.requires_grad)
            learned.changes = None if weights is None else weights.detach()  # type: ignore[attr-defined]
            delattr(self, name)
            self.register_parameter(name, learned)

    def settle(self) -> None:
        """Makes the tensors buffers again."""
        for name, tensor in zip(Weights._fields, self.parts(), strict=True):
            if tensor is not None:
                delattr(self, name)
                self.register_buffer(name, tensor.detach(), persistent=False)


def added(tensor: Tensor | None, share: float, change: Tensor | None) -> Tensor | None:
    """``tensor + share * change``, where both are there; in the type of the tensor."""
    return tensor if tensor is None or change is None else tensor + (share * change).to(tensor.dtype)
