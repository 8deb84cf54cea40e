"""Sizes that a description announces, compared with the tensors in the file before anything large is built.

A model is built without storage first, and its tensors are compared with the header of the weights' file, whose own
sizes safetensors compares with the size of the file. What that cannot bound is bounded here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
from timm.layers import PatchEmbed, to_2tuple
from torch import nn

from stratavit.errors import ArtifactError, shown
from stratavit.files.state_dicts import Shape, check_fit
from stratavit.models import architecture
from stratavit.models.families import family_of
from stratavit.utils.model import patches_of

RESERVED = {*inspect.signature(timm.create_model).parameters, "device", "dtype", "pretrained_strict"} - {"kwargs"}
LARGEST = 1 << 16  # of a number that no tensor has as a dimension: nothing that timm names comes near
TOKENS = 1 << 17  # of one image
NOT_SIZES = ("rope_theta", "_token_id")  # endings of names, in configurations of transformers, of other numbers
POSITIONS = 1 << 24  # of words: language models announce more of them than any tensor has rows
BUFFERS = 1 << 26  # numbers that a model may compute next to its weights, however few these are


def build_model(description: Any, shapes: Mapping[str, Shape], source: str, weights: str) -> nn.Module:
    """The model of a description, if the weights are those of such a model; without storage where its family can be.

    Args:
        description: See `architecture.describe`, from a file.
        shapes: Of the tensors in the weights' file.
        source, weights: Names of the two files, for the message.

    Raises:
        ArtifactError: It cannot be built, the weights do not fit, or its memory would be out of proportion to them.
    """
    check_numbers(description.get("args"), shapes, source)
    check_numbers(description.get("sites"), shapes, source)
    model = architecture.build(description, device="meta", computed=False)
    check_fit(model, shapes, weights)
    if not family_of(model).has_buffers:
        return model
    computed = sum(buffer.numel() for buffer in model.buffers())
    allowed = BUFFERS + 4 * sum(math.prod(shape) for shape in shapes.values())
    if computed > allowed:
        raise ArtifactError(
            f"{source}: the model would compute {computed:.2g} numbers next to its weights, expected at most "
            f"{allowed:.2g}; save the model again"
        )
    return architecture.build(description)


def check_numbers(announced: Any, shapes: Mapping[str, Shape], source: str) -> None:
    """Whether a part of a description has numbers in proportion to the tensors of the weights' file.

    Raises:
        ArtifactError: One has not, or is an argument that reads other files than the folder's.
    """
    if not isinstance(announced, dict):
        raise ArtifactError(f"{source}: args and sites of the model should be JSON objects; save the model again")
    for name in sorted(RESERVED & set(announced)):
        raise ArtifactError(f"{source}: {name!r} is not an argument that describes a model; save the model again")
    largest = max([LARGEST, *(side for shape in shapes.values() for side in shape)])
    for name, number in _numbers(announced):
        if not abs(number) <= largest:
            raise ArtifactError(
                f"{source}: {shown(name)} is {str(number)[:40]}, expected at most {largest}; save the model again"
            )


def check_config(config: Mapping[str, Any], shapes: Mapping[str, Shape], source: str) -> None:
    """The same for a configuration of transformers.

    Raises:
        ArtifactError: See `check_numbers`.
    """
    skipped = RESERVED | {"id2label", "label2id"}
    sizes = _sizes_in({key: value for key, value in config.items() if key not in skipped}, source)
    check_numbers(sizes, shapes, source)


def _sizes_in(value: Any, source: str) -> Any:
    """A JSON value without numbers that set no size, and without numbers of positions, which are checked."""
    if isinstance(value, list):
        return [_sizes_in(inner, source) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        if key.endswith("max_position_embeddings") and isinstance(inner, int) and inner > LARGEST:
            if inner > POSITIONS:
                raise ArtifactError(f"{source}: {shown(key)} is {str(inner)[:40]}, expected at most {POSITIONS}")
        elif not key.endswith(NOT_SIZES):
            found[key] = _sizes_in(inner, source)
    return found


def check_images(model: nn.Module, size: Sequence[int], source: str) -> None:
    """Whether a model reads images of a size ``(C, H, W)``.

    Raises:
        ArtifactError: It does not, or there would be too many tokens.
    """
    patches: Any = patches_of(model)
    channels = architecture.channels_of(model, size[0])
    stride = getattr(getattr(patches, "proj", None), "stride", 1)
    sides = list(to_2tuple(getattr(patches, "patch_size", None) or stride))
    padded = not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad or patches.strict_img_size
    fits = all(length >= side and (padded or length % side == 0) for side, length in zip(sides, size[1:], strict=True))
    if channels != size[0] or not fits:
        raise ArtifactError(
            f"{source}: data_config prepares images of {list(size)}, the model reads {channels} channels in patches of "
            f"{sides[0]} x {sides[1]} pixels; save the model again"
        )
    tokens = math.prod(length // side for side, length in zip(sides, size[1:], strict=True))
    if tokens > TOKENS:
        raise ArtifactError(f"{source}: data_config makes {tokens:.2g} tokens, expected at most {TOKENS}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in a JSON value, each with the key that it stands under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value
