"""A super-network whose model its owner has changed: description, image size and cost follow, or the change is refused.

`reset_classifier`, another layer as the head and `set_input_size` can be followed. The state dict of a super-network's
model is the stock one, so what the changed arguments build must have the same tensors, and compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from stratavit.elastic.token_places import TokenPlace
from stratavit.errors import ArtifactError, StrataViTError
from stratavit.files.state_dicts import check_fit
from stratavit.models import architecture
from stratavit.models.cost import CostModel, cost_model
from stratavit.models.families import family_of, reads_patches
from stratavit.models.families.base import pooling_of
from stratavit.models.final_mean import Shift
from stratavit.models.output_checks import Subject, check_same_outputs
from stratavit.models.source_checks import own_routines
from stratavit.utils.classifier import head_layers, with_plain_head
from stratavit.utils.model import patches_of


def form_of(model: Any) -> tuple[Any, ...]:
    """What the owner of a super-network may change of its model: sizes of images and tokens, pooling, heads."""
    patches = patches_of(model)
    heads = [tuple(p.shape) for layer in head_layers(model).values() for p in layer.parameters()]
    positions = getattr(model, "pos_embed", None)
    sizes = (
        getattr(patches, "img_size", None),
        getattr(patches, "patch_size", None),
        tuple(getattr(positions, "shape", ())),  # a module that computes positions has none
    )
    return (model.num_classes, pooling_of(model), *sizes, *heads)


def follow(net: Any) -> tuple[dict[str, Any], dict[str, Any], CostModel, tuple[Any, ...]]:
    """Description, data configuration, cost and form of a super-network as its owner has made its model.

    A head that the owner has put there becomes one of timm's, in place. The sites stay as they were.

    Raises:
        ArtifactError: It was changed in a way that timm's arguments cannot express.
        UnsupportedModelError: It is now one that cannot be cut.
    """
    model = net.model
    with_plain_head(model, in_place=True)
    if net.joint_strata is not None and any(place.unread for place in net._cost.places) and reads_patches(model):
        raise ArtifactError(
            "the model's outputs now read patches, which the list over both axes drops in the last block; set "
            "net.joint_strata to None, or undo the change"
        )
    family_of(model).check(model)
    description = {**net.description, "args": {**net.description["args"], **family_of(model).arguments(model)}}
    _check_tensors(model, architecture.build(description, "meta", computed=False))
    size: Any = architecture.own_size(model, net.data_config["input_size"])
    cost = cost_model(model, net.sites, size, net.uncut, _read_again(model, net._cost.places))
    _check_rebuilt(net, description, size)
    return description, {**net.data_config, "input_size": size}, cost, form_of(model)


def _read_again(model: nn.Module, places: tuple[TokenPlace, ...]) -> tuple[TokenPlace, ...]:
    """The places, after a change of what outputs read."""
    return *places[:-1], *(replace(place, unread=not reads_patches(model)) for place in places[-1:])


def _check_tensors(model: nn.Module, built: nn.Module) -> None:
    """Whether the model of a super-network has the tensors of one that was built from its description."""
    try:
        check_fit(built, {name: tuple(t.shape) for name, t in model.state_dict().items()}, "the changed model")
    except ArtifactError as error:
        raise ArtifactError(
            f"the model of this super-network was changed in a way that cannot be followed ({error}); undo it, or "
            "change the model before SuperNet(model)"
        ) from error


def check_followed(net: Any) -> None:
    """Whether what loading builds of a super-network has its tensors and computes the same, at full size.

    Raises:
        ArtifactError: It does not.
    """
    _check_rebuilt(net, net.description, net.data_config["input_size"])


def _check_rebuilt(net: Any, description: Mapping[str, Any], size: Any) -> None:
    built = architecture.build(description)
    _check_tensors(net.model, built)
    built = architecture.filled(built, net.model)
    check_same_outputs("save", ArtifactError, Subject(net.model, net), [Subject(built, built)], size)


def check_small(net: Any, small: nn.Module, widths: Mapping[str, int]) -> None:
    """Whether a small model computes what its super-network does; run only if hooks or methods were added later.

    Raises:
        StrataViTError: It does not.
    """
    modules = list(net.modules())
    hooks = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
    if any(not isinstance(hook, Shift) for hook in hooks) or any(map(own_routines, modules)):
        prefix, size = Subject(net.model, lambda images: net(images, widths)), net.data_config["input_size"]
        check_same_outputs("extract from", StrataViTError, prefix, [Subject(small, small)], size)
