"""A super-network whose model its owner has changed: description, image size and cost follow, or the change is refused.

`reset_classifier`, another layer as the head and `set_input_size` can be followed. The state dict of a super-network's
model is the stock one, so what the changed arguments build must have the same tensors, and answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stratavit.errors import ArtifactError, StrataViTError
from stratavit.files.state_dicts import check_fit
from stratavit.models import architecture
from stratavit.models.equality import Subject, check_extracted, check_saved
from stratavit.models.families import family_of
from stratavit.models.final_mean import Shift
from stratavit.models.source_checks import own_routines
from stratavit.utils.classifier import head_layers, with_plain_head

WAY_OUT = "undo it, or change the model before SuperNet(model)"


def form_of(model: Any) -> tuple[Any, ...]:
    """What the owner of a super-network may change of its model: sizes of images and tokens, pooling, heads."""
    patches = model.patch_embed
    heads = [tuple(p.shape) for layer in head_layers(model).values() for p in layer.parameters()]
    positions = getattr(model, "pos_embed", None)
    return (
        model.num_classes,
        model.global_pool,
        patches.img_size,
        patches.patch_size,
        *heads,
        None if positions is None else tuple(positions.shape),
    )


def description_now(old: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The description of a super-network's model as it is now; its sites stay as they were.

    Raises:
        StrataViTError: It was changed in a way that no arguments of timm's say.
    """
    description = {**old, "args": {**old["args"], **family_of(model).arguments(model)}}
    try:
        _check_tensors(model, architecture.build(description, "meta", computed=False))
    except ArtifactError as error:
        raise StrataViTError(str(error)) from error
    return description


def _check_tensors(model: nn.Module, built: nn.Module) -> None:
    """Whether the model of a super-network has the tensors of one that was built from its description."""
    try:
        check_fit(built, {name: tuple(t.shape) for name, t in model.state_dict().items()}, "the changed model")
    except ArtifactError as error:
        raise ArtifactError(
            f"the model of this super-network was changed in a way that cannot be followed ({error}); {WAY_OUT}"
        ) from error


def plain_heads(model: nn.Module) -> None:
    """Makes a head that its owner has put into a super-network's model one of timm's, in place."""
    with_plain_head(model, in_place=True)


def check_followed(net: nn.Module, model: nn.Module, description: Mapping[str, Any], size: Any) -> None:
    """Whether what loading would build of a super-network has its tensors and answers as it does, at full size.

    Args:
        net: The super-network.
        model: Its elastic model.
        description: From which loading would build.
        size: Of its images.

    Raises:
        ArtifactError: It does not.
    """
    built = architecture.build(description)
    _check_tensors(model, built)
    check_saved(Subject(model, net), architecture.filled(built, model), size)


def check_small(net: Any, model: nn.Module, small: nn.Module, widths: Mapping[str, int], size: Any) -> None:
    """Whether a small model answers as its super-network does; tried where hooks or methods of instances came later.

    Args:
        net: The super-network.
        model: Its elastic model.
        small: What was cut out of it.
        widths: At which.
        size: Of its images.

    Raises:
        StrataViTError: It does not.
    """
    if any(_followed_by_others(module) for module in net.modules()):
        check_extracted(Subject(model, lambda images: net(images, widths)), small, size)


def _followed_by_others(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return bool(own_routines(module)) or any(not isinstance(hook, Shift) for hook in hooks)
