"""The head of a model as it is: how many classes its layers tell apart, whatever ``num_classes`` says.

``model.head = nn.Linear(width, classes)`` is the usual way to give a model a new head; it does not set `num_classes`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from timm.layers import ClassifierHead, ClNormMlpClassifierHead, NormMlpClassifierHead
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.mvitv2 import MultiScaleVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from stratavit.errors import UnsupportedModelError

POOLING_HEADS = (  # models whose head holds more than the layer of the classes: it pools, normalises, or drops out
    *(SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr, VisionTransformerSAM),
    *(DaVit, GlobalContextVit, Hiera, HieraDet, MultiScaleVit),
)
HEADS = (ClassifierHead, NormMlpClassifierHead, ClNormMlpClassifierHead)
WAY_OUT = "call model.reset_classifier(num_classes), or put a Linear layer there"


def classes_in_head(model: Any) -> int | None:
    """Classes that the layers of a timm model's head tell apart, 0 without a head; None of a head of another form."""
    holder = getattr(model, "head", None)
    if isinstance(holder, HEADS):
        holder = holder.fc
    head = _apart(holder) if isinstance(holder, nn.Module) else None
    return None if head is None else _classes(head[0])


def head_layers(model: Any) -> dict[str, nn.Module]:
    """Name -> what leads into the classes, of a model of a known family.

    Raises:
        UnsupportedModelError: The pooling in front of the head was lost.
    """
    if not isinstance(model, POOLING_HEADS):
        second = ("head_dist",) if getattr(model, "head_dist", None) is not None else ()
        return {name: getattr(model, name) for name in ("head", *second) if hasattr(model, name)}
    if not isinstance(model.head, nn.Sequential if isinstance(model, MultiScaleVit) else HEADS):
        raise UnsupportedModelError(
            f"head: this {type(model).__name__} pools its tokens in a head of timm's, found a "
            f"{type(model.head).__name__}; call model.reset_classifier(num_classes), or put a Linear layer at head.fc"
        )
    holder: Any = model.head
    return {"head.fc": holder.fc}


def with_plain_head(model: Any, in_place: bool = False) -> Any:
    """The model with the head that timm would give it: one linear layer or none, dropout before it, true `num_classes`.

    Args:
        model: Of a known family.
        in_place: Change the model itself; else what is returned is another object that shares all layers and weights,
            or the model itself if there is nothing to change.

    Raises:
        UnsupportedModelError: The head is of another form.
    """
    found = {name: _taken(name, holder, model) for name, holder in head_layers(model).items()}
    counts = {_classes(layer) for layer, _ in found.values()} or {model.num_classes}
    if len(counts) > 1:
        raise UnsupportedModelError(f"head, head_dist: they tell apart {sorted(counts)} classes; {WAY_OUT}, in both")
    classes = counts.pop()
    if classes == model.num_classes and all(model.get_submodule(name) is layer for name, (layer, _) in found.items()):
        return model
    plain = model if in_place else _twin(model)
    plain.num_classes = classes
    for name, (layer, rate) in found.items():
        owner, drop, leaf = plain, "head_drop", name
        if name == "head.fc":
            plain.head = owner = model.head if in_place else _twin(model.head)
            drop, leaf = "drop", "fc"
        setattr(owner, leaf, layer)
        if rate and leaf != "head_dist":  # which shares the other's
            before = getattr(owner, drop).p
            setattr(owner, drop, nn.Dropout(1 - (1 - before) * (1 - rate)).train(model.training))
    return plain


def _classes(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _taken(name: str, holder: nn.Module, model: Any) -> tuple[nn.Module, float]:
    """What `_apart` finds, checked against what the model's forward pass needs there."""
    head = _apart(holder)
    if head is None:
        kinds = ", ".join(type(part).__name__ for part in _parts(holder))
        raise UnsupportedModelError(
            f"{name}: expected a Linear layer, perhaps dropout before it, or an Identity, found {kinds}; {WAY_OUT}"
        )
    pooled = getattr(model.head, "num_features", model.num_features) if name == "head.fc" else None
    width = pooled or getattr(model, "head_hidden_size", model.num_features)
    layer = head[0]
    if isinstance(layer, nn.Linear) and layer.in_features != width:
        raise UnsupportedModelError(
            f"{name}: its input has {layer.in_features} features, the model's features are {width}; "
            f"{WAY_OUT} of {width} inputs"
        )
    if isinstance(layer, nn.Linear) and layer.bias is None:
        raise UnsupportedModelError(
            f"{name}: a Linear layer without a bias, which timm's heads have; give it one of zeros, or "
            "call model.reset_classifier(num_classes)"
        )
    return head


def _apart(holder: nn.Module) -> tuple[nn.Module, float] | None:
    """The linear layer, or an Identity, and the rate of the dropout before it; None if it is more than these."""
    layer, kept = None, 1.0
    for part in _parts(holder):
        if type(part) is nn.Dropout and layer is None:
            kept *= 1 - part.p
        elif type(part) is nn.Linear and layer is None:
            layer = part
        elif type(part) is not nn.Identity:
            return None
    if layer is None:
        return holder if type(holder) is nn.Identity else nn.Identity(), 1 - kept
    return layer, 1 - kept


def _parts(holder: nn.Module) -> Iterator[nn.Module]:
    if type(holder) is nn.Sequential:
        for part in holder:
            yield from _parts(part)
    else:
        yield holder


def _twin(module: nn.Module) -> Any:
    """Another module of the same parts, of which any may be replaced without a change to the first."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
