"""A super-network whose model its owner has changed: description, image size and cost follow, or the change is refused.

`reset_classifier`, another layer as the head and `set_input_size` can be followed. The state dict of a super-network's
model is the stock one, so what the changed arguments build must have the same tensors, and answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from stratavit import architecture
from stratavit.classifier import head_layers, with_plain_head
from stratavit.errors import ArtifactError, StrataViTError
from stratavit.families import family_of
from stratavit.fidelity import Subject, check_extracted, check_saved
from stratavit.intake import own_routines
from stratavit.weights import check_fit

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet

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


def description_now(net: SuperNet) -> dict[str, Any]:
    """The description of a super-network's model as it is now; its sites stay as they were.

    Raises:
        StrataViTError: It was changed in a way that no arguments of timm's say.
    """
    old = net.description
    description = {**old, "args": {**old["args"], **family_of(net.model).arguments(net.model)}}
    try:
        _check_tensors(net, architecture.build(description, "meta", computed=False))
    except ArtifactError as error:
        raise StrataViTError(str(error)) from error
    return description


def _check_tensors(net: SuperNet, built: nn.Module) -> None:
    """Whether the model of a super-network has the tensors of one that was built from its description."""
    try:
        check_fit(built, {name: tuple(t.shape) for name, t in net.model.state_dict().items()}, "the changed model")
    except ArtifactError as error:
        raise ArtifactError(
            f"the model of this super-network was changed in a way that cannot be followed ({error}); {WAY_OUT}"
        ) from error


def plain_heads(model: nn.Module) -> None:
    """Makes a head that its owner has put into a super-network's model one of timm's, in place."""
    with_plain_head(model, in_place=True)


def check_followed(net: SuperNet, description: Mapping[str, Any]) -> None:
    """Whether what loading would build of a super-network has its tensors and answers as it does, at full size.

    Raises:
        ArtifactError: It does not.
    """
    built = architecture.build(description)
    _check_tensors(net, built)
    check_saved(Subject(net.model, net), architecture.filled(built, net.model), net.data_config["input_size"])


def check_small(net: SuperNet, small: nn.Module, widths: Mapping[str, int]) -> None:
    """Whether a small model answers as its super-network does; tried where hooks or methods of instances came later.

    Raises:
        StrataViTError: It does not.
    """
    if any(_followed_by_others(module, net) for module in net.modules()):
        answers = Subject(net.model, lambda images: net(images, widths))
        check_extracted(answers, small, net.data_config["input_size"])


def _followed_by_others(module: nn.Module, net: SuperNet) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return bool(own_routines(module)) or any(hook is not net._shift for hook in hooks)
