"""Sizes that a description announces, held against the tensors that are there before anything large is built.

A model is built without storage first. What that cannot bound, numbers of blocks and of positions, is compared with the
header of the weights' file, whose own sizes safetensors compares with the size of the file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
from timm.layers import PatchEmbed
from torch import nn

from stratavit.errors import ArtifactError, shown
from stratavit.files.state_dicts import Shape, check_fit
from stratavit.models import architecture
from stratavit.models.families import family_of

RESERVED = {*inspect.signature(timm.create_model).parameters, "device", "dtype", "pretrained_strict"} - {"kwargs"}
LARGEST = 1 << 16  # of a number that no tensor has as a dimension: nothing that timm names comes near
POSITIONS = 1 << 17
DEPTHS = ("depth", "num_hidden_layers", "num_layers")
BUFFERS = 1 << 26  # numbers that a model may compute beside its weights, whatever their count


def build_model(description: Any, shapes: Mapping[str, Shape], source: str, weights: str) -> nn.Module:
    """The model of a description, if the weights are those of such a model; without storage where its family can be.

    Args:
        description: See `architecture.describe`, from a file.
        shapes: Of the tensors in the weights' file.
        source, weights: Names of the two files, for the message.

    Raises:
        ArtifactError: It cannot be built, the weights do not fit, or it would take memory out of proportion to them.
    """
    check_numbers(description.get("args"), shapes, source)
    check_numbers(description.get("sites"), shapes, source)
    model = architecture.build(description, device="meta", computed=False)
    check_fit(model, shapes, weights)
    if not family_of(model).has_buffers:
        return model
    ours = sum(buffer.numel() for buffer in model.buffers())
    allowed = BUFFERS + 4 * sum(math.prod(shape) for shape in shapes.values())
    if ours > allowed:
        raise ArtifactError(
            f"{source}: the model would compute {ours:.2g} numbers beside its weights, which is out of proportion to "
            f"them (at most {allowed:.2g}); save the model again"
        )
    return architecture.build(description)


def check_numbers(announced: Any, shapes: Mapping[str, Shape], source: str) -> None:
    """Holds the numbers of a description against the tensors that are there.

    Raises:
        ArtifactError: One is out of proportion, not finite, or an argument that reads other files than the folder's.
    """
    if not isinstance(announced, dict):
        raise ArtifactError(f"{source}: args and sites of the model should be JSON objects; save the model again")
    refused = sorted(RESERVED & set(announced))
    if refused:
        raise ArtifactError(f"{source}: {refused[0]!r} is no argument that describes a model; save the model again")
    largest = max([LARGEST, *(side for shape in shapes.values() for side in shape)])
    for name, number in _numbers(announced):
        limit = len(shapes) if name.startswith(DEPTHS) else largest
        if not abs(number) <= limit:
            raise ArtifactError(
                f"{source}: {shown(name)} is {str(number)[:40]}, more than the {len(shapes)} tensors in the weights "
                f"can have (at most {limit}); save the model again"
            )
    _check_positions(_pair(announced.get("img_size")), _pair(announced.get("patch_size")), f"{source}: img_size")


def _check_positions(lengths: Sequence[float], patches: Sequence[float], source: str) -> None:
    positions = math.prod(length / max(side, 1) for length, side in zip(lengths, patches, strict=True))
    if positions > POSITIONS:
        raise ArtifactError(f"{source} makes {positions:.2g} tokens, expected at most {POSITIONS}")


def check_images(model: nn.Module, size: Sequence[int], source: str) -> None:
    """Whether a model takes images of a size ``(C, H, W)``.

    Raises:
        ArtifactError: It does not, or there would be too many tokens.
    """
    patches: Any = getattr(model, "patch_embed", None)
    channels = architecture.channels_of(patches, size[0])
    sides = _pair(list(getattr(patches, "patch_size", None) or [1, 1]))
    padded = not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad or patches.strict_img_size
    whole = all(length >= side and (padded or length % side == 0) for side, length in zip(sides, size[1:], strict=True))
    if channels != size[0] or not whole:
        raise ArtifactError(
            f"{source}: data_config prepares images of {list(size)}, the model reads {channels} channels in patches of "
            f"{sides[0]} x {sides[1]} pixels; save the model again"
        )
    _check_positions(size[1:], sides, f"{source}: data_config")


def check_config(config: Mapping[str, Any], shapes: Mapping[str, Shape], source: str) -> None:
    """The same for a configuration of transformers.

    Raises:
        ArtifactError: See `check_numbers`.
    """
    sizes = {"img_size": config.get("image_size"), "patch_size": config.get("patch_size")}
    known = {key: value for key, value in config.items() if key not in RESERVED and key not in ("id2label", "label2id")}
    check_numbers(known | sizes, shapes, source)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value


def _pair(value: Any) -> list[float]:
    """Two sides, 1 where they are not said."""
    sides = [value, value] if isinstance(value, int | float) else value
    sound = isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int | float) for side in sides)
    return list(sides) if sound else [1, 1]
