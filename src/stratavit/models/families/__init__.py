"""The families of models that can be cut, and the kinds of modules in them.

A new family is a subclass of `base.Family`, a new kind of module a subclass of `elastic.base.ElasticSite`; both are
listed here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.davit import WindowAttention as DaVitAttention
from timm.models.eva import EvaAttention
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention as HieraDetAttention
from timm.models.nest import Attention as NestAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as MapAttention
from timm.models.volo import Attention as VoloAttention
from torch import Tensor, nn

from stratavit.elastic.attention import ElasticAttention, ElasticSplit
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.grouped import ElasticBlocks, ElasticMaskUnits, ElasticTokenMap, ElasticWindow
from stratavit.elastic.mlp import ElasticGlu, ElasticMlp, ElasticSwiGlu
from stratavit.elastic.relative_attention import (
    ElasticBeit,
    ElasticCosine,
    ElasticMap,
    ElasticRelPos,
    ElasticWindows,
)
from stratavit.elastic.site import Site
from stratavit.elastic.whole_heads import ElasticWholeHeads
from stratavit.errors import UnsupportedModelError
from stratavit.models.families.base import Family, Stages
from stratavit.models.families.class_attention import CaitFamily, Volo, XcitFamily
from stratavit.models.families.eva import BeitFamily, EvaFamily
from stratavit.models.families.hierarchical import DaVitFamily, GcVit, HieraDetFamily, HieraFamily, MViT
from stratavit.models.families.hosted import Hosted, HostedPart
from stratavit.models.families.naflex import NaFlex
from stratavit.models.families.pyramids import NestFamily, Pit, TwinsFamily
from stratavit.models.families.relpos import RelPos
from stratavit.models.families.sam import Sam
from stratavit.models.families.swin import Swin, SwinV2, SwinV2Cr
from stratavit.models.families.vit import Vit

FAMILIES: tuple[Family, ...] = (
    *(Vit(), EvaFamily(), BeitFamily(), RelPos(), NaFlex(), Sam()),
    *(Swin(), SwinV2(), SwinV2Cr()),
    *(XcitFamily(), CaitFamily(), Volo(), Pit(), TwinsFamily(), NestFamily()),
    *(DaVitFamily(), HieraFamily(), HieraDetFamily(), GcVit(), MViT()),
)
KINDS: dict[type[nn.Module], type[Any]] = {
    Attention: ElasticAttention,
    AttentionRope: ElasticSplit,
    EvaAttention: ElasticSplit,
    BeitAttention: ElasticBeit,
    WindowAttention: ElasticWindows,
    WindowAttentionV2: ElasticCosine,
    WindowMultiHeadAttention: ElasticCosine,
    RelPosAttention: ElasticRelPos,
    MapAttention: ElasticMap,
    NestAttention: ElasticBlocks,
    DaVitAttention: ElasticWindow,
    VoloAttention: ElasticTokenMap,
    HieraDetAttention: ElasticTokenMap,
    MaskUnitAttention: ElasticMaskUnits,
    Mlp: ElasticMlp,
    GluMlp: ElasticGlu,
    SwiGLU: ElasticSwiGlu,
}
_BETWEEN_CHANNELS = "a softmax between channels does not allow them to be rotated"
WHY_NOT = {  # class of timm -> why it is not among `KINDS`
    "TalkingHeadAttn": "its heads mix their scores before and after the softmax",
    "XCA": _BETWEEN_CHANNELS,
    "ChannelAttention": _BETWEEN_CHANNELS,
    "ChannelAttentionV2": _BETWEEN_CHANNELS,
    "OutlookAttention": "a token's weights are computed from it alone, without q and k",
    "GlobalSubSampleAttn": "k and v are those of other tokens than q",
    "WindowAttentionGlobal": "queries of the whole image come from outside",
    "MultiScaleAttention": "q, k and v are pooled by convolutions and normalised",
}


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to.

    Raises:
        UnsupportedModelError: It belongs to none.
    """
    if isinstance(model, HostedPart):
        return Hosted()
    for family in FAMILIES:
        if isinstance(model, family.model):
            return family
    classes = {family.model.__name__: family.model for family in FAMILIES}
    kind, origin = type(model).__name__, type(model).__module__
    inside = [name for name, module in model.named_modules() if isinstance(module, (*classes.values(),))]
    if origin.split(".")[0] == "peft":
        reason = "merge the adapters first: model.merge_and_unload()"
    elif origin.startswith("open_clip.") and hasattr(model, "visual"):
        reason = "pass its image tower, model.visual"
    elif origin == "timm.models._features":  # what `features_only=True` makes
        reason = 'it returns several maps: cut it where it is, stratavit.convert_part(model, "", loader)'
    elif inside:
        reason = f"it holds a timm model: pass that, model.{inside[0]}, or cut it in place by convert_part"
    elif kind in classes:
        reason = f"{origin}.{kind} is not timm's class of that name; load the weights into timm's, or transformers'"
    else:
        reason = (
            f"expected a timm model of one of the classes {', '.join(classes)}; "
            "`stratavit models` lists what is supported"
        )
    raise UnsupportedModelError(f"cannot cut a {kind}: {reason}")


def kind_of(module: nn.Module) -> type[ElasticSite] | None:
    """The elastic class of a stock module; None if there is none."""
    kind: type[ElasticSite] | None = KINDS.get(type(module))
    if kind is ElasticAttention and not isinstance(getattr(module, "q_norm", nn.Identity()), nn.Identity):
        return ElasticSplit  # qk-norm
    return kind


def elastic_sites(model: nn.Module, whole_heads: bool = False) -> tuple[dict[str, ElasticSite], dict[str, str]]:
    """An elastic module for every site of a model, sharing its weights, in order of execution.

    Args:
        model: The model.
        whole_heads: Plain attention loses whole heads, not coordinates of all of them.

    Returns:
        Site name -> elastic module; name -> reason for every attention and MLP module that stays uncut.

    Raises:
        UnsupportedModelError: The model is of no known family, nothing of it can be cut, or no whole heads.
    """
    from stratavit.elastic.rotary import ElasticRotary, cuts_pairs  # here, so that the chain of imports stays short

    family = family_of(model)
    family.check(model)
    found: dict[str, ElasticSite] = {}
    uncut: dict[str, str] = {}
    for block_name, block in family.blocks(model):
        for leaf in ("attn", "mlp"):
            name, module = f"{block_name}.{leaf}", getattr(block, leaf)
            kind: Any = kind_of(module)
            if kind is ElasticSplit and leaf == "attn" and getattr(model, "rope", None) is not None:
                kind = ElasticRotary if cuts_pairs(module) else kind
            if whole_heads and type(module) is Attention:  # with qk-norm, too
                kind = ElasticWholeHeads
            if kind is None:
                kinds = "attention" if leaf == "attn" else "MLPs"
                why = f" ({WHY_NOT[type(module).__name__]})" if type(module).__name__ in WHY_NOT else ""
                uncut[name] = f"{name}: {type(module).__name__} is not among the kinds of {kinds} that can be cut{why}"
            elif (refused := kind.refusal(module)) is not None:
                uncut[name] = f"{name}.{refused[0]}: {refused[1]}"
            else:
                found[name] = kind(module)
    if not found:
        raise UnsupportedModelError(f"cannot cut this model: {next(iter(uncut.values()))}")
    if whole_heads and not any(site.whole_heads for site in found.values()):
        raise UnsupportedModelError("whole_heads: this model has no attention module that is timm's plain Attention")
    return found, uncut


def find_sites(model: nn.Module, whole_heads: bool = False) -> tuple[Site, ...]:
    """The attention and MLP modules of a model that can be cut, in order of execution.

    Raises:
        UnsupportedModelError: See `elastic_sites`.
    """
    return tuple(module.site(name) for name, module in elastic_sites(model, whole_heads)[0].items())


def stages(model: nn.Module) -> Stages:
    """Splits a supported model at its blocks, so that work before a block can be shared."""
    return family_of(model).stages(model)


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm whose bias is added to what the head reads; None if there is none with a bias, or two heads."""
    return family_of(model).last_norm(model)


def merging(model: nn.Module) -> int | str:
    """Tokens in front of the patches, where the blocks of a model can merge tokens; else why they cannot."""
    return family_of(model).merging(model)


def reads_patches(model: nn.Module) -> bool:
    """Whether a model's outputs depend on what its last block makes of the patches, or on prefix tokens alone."""
    return family_of(model).reads_patches(model)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the residual blocks, in order of execution."""
    return [name for name, _ in family_of(model).blocks(model)]


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of images, if a model takes no others and its patch embedding does not say so."""
    family = next((family for family in FAMILIES if isinstance(model, family.model)), None)
    return None if family is None else family.fixed_size(model)


def layer_scale(model: nn.Module, site: str) -> Tensor | None:
    """LayerScale factors ``[C]`` of a site's output, or None."""
    return family_of(model).layer_scale(model, site)
