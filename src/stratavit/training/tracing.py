"""What a network does block by block, compared with what its teacher does: both have a residual stream of one width.

Shape legend: B images, N patches, n tokens that stand for them, P prefix tokens (class, registers), C token width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratavit.calibration.objectives import relative_errors
from stratavit.elastic.merging import Merged
from stratavit.errors import StrataViTError
from stratavit.models.families import stages
from stratavit.training.teacher import Teacher
from stratavit.utils.devices import memberships
from stratavit.utils.model import eval_mode, model_device, model_dtype


class Trace(NamedTuple):
    """What a model made of images.

    Attributes:
        blocks: Tokens that come out of every block, ``[B, P+N, C]`` or merged.
        tokens: The last ones, after the norm.
        outputs: Logits ``[B, classes]`` or features.
    """

    blocks: tuple[Tensor | Merged, ...]
    tokens: Tensor
    outputs: Tensor


def trace(model: Any, images: Tensor) -> Trace:
    """Runs a timm model of a known family on images ``[B, C, H, W]``."""
    parts, blocks = stages(model), []
    tokens = parts.stem(images)
    for _, block in parts.blocks:
        tokens = block(tokens)
        blocks.append(tokens)
    return Trace(tuple(blocks), model.norm(tokens), parts.tail(tokens))


class Followed(nn.Module):
    """A network that returns a `Trace`.

    Args:
        net: A `SuperNet`, or `finetune.Plain`.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, spec: Mapping[str, int] | None = None) -> Trace:
        """Images ``[B, C, H, W]`` at a spec, the full size if None."""
        with self.net.at(spec) as model:
            return trace(model, images)


def followed(net: Any, teacher: Teacher | None) -> Followed:
    """A network, and its teacher if there is one, made to return a `Trace`; see `Followed` and `follow`."""
    if teacher is not None:
        follow(teacher, net.model)
    return Followed(net)


def follow(teacher: Teacher, student: nn.Module) -> None:
    """Makes a teacher return a `Trace` from now on.

    Raises:
        StrataViTError: Its blocks and the student's do not correspond.
    """
    teacher.run = partial(trace, teacher.model)
    image = torch.zeros(1, *teacher.input_size, device=model_device(student), dtype=model_dtype(student))
    with torch.no_grad(), eval_mode(student):
        theirs = [_shape(tokens) for tokens in teacher(image).blocks]
        ours = [_shape(tokens) for tokens in trace(student, image).blocks]
    if None in theirs or len(ours) != len(theirs):
        what = "merges tokens" if None in theirs else f"has {len(theirs)} blocks, the student {len(ours)}"
        raise StrataViTError(f"teacher: it {what}; give the model that the student was made from")
    prefix = getattr(student, "num_prefix_tokens", None)
    for one, other in zip(ours, theirs, strict=True):
        assert other is not None
        if one not in (None, other, (prefix, other[-1])):  # without patches, if nobody reads them
            raise StrataViTError(
                f"teacher: a block passes on {other} (tokens, width), of the student {one}; give the model that the "
                "student was made from"
            )


def _shape(tokens: Tensor | Merged) -> tuple[int, ...] | None:
    return None if isinstance(tokens, Merged) else tuple(tokens.shape[1:])


def block_error(ours: Trace, theirs: Trace) -> Tensor:
    """Relative squared error of what comes out of the blocks, their mean; merged tokens see `merged_like`."""
    errors = []
    for state, tokens in zip(ours.blocks, theirs.blocks, strict=True):
        assert isinstance(tokens, Tensor)  # see `follow`
        errors.append(token_error(state, tokens))
    return torch.stack(errors).mean()


def token_error(state: Tensor | Merged, tokens: Tensor) -> Tensor:
    """Mean relative squared error of tokens; merged ones see `merged_like`, patches that were dropped do not count."""
    if isinstance(state, Merged):
        return relative_errors(state.tokens, merged_like(state, tokens)).mean()
    return relative_errors(state, tokens[:, : state.shape[1]]).mean()


def merged_like(state: Merged, tokens: Tensor) -> Tensor:
    """Tokens ``[B, P+N, C]``, the patches averaged as another network has merged them: ``[B, P+n, C]``."""
    prefix = state.prefix
    joins = memberships(state.home, state.size.shape[1]).type_as(tokens)  # [B, N, n]
    patches = joins.transpose(1, 2) @ tokens[:, prefix:] / state.size.unsqueeze(2).type_as(tokens)
    return torch.cat([tokens[:, :prefix], patches], dim=1)
