"""Spec -> plain small model: stock timm layers holding slices of the super-network's weights.

No search and no training: each kept weight is copied once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stratavit.architecture import build_site
from stratavit.elastic import ElasticAttention, ElasticSite
from stratavit.final_mean import plain_norm
from stratavit.structure import Site, last_norm


def small_model(
    model: VisionTransformer, sites: tuple[Site, ...], widths: Mapping[str, int], shift: Tensor | None = None
) -> nn.Module:
    """Copies a sub-network out of a super-network's model.

    Args:
        model: The model with elastic modules; unchanged.
        sites: Its sites.
        widths: Kept width of every site.
        shift: Added to the bias of the last norm, ``[C]``.

    Returns:
        A timm `VisionTransformer` in eval mode that shares no storage with `model`.
    """
    # deepcopy takes the small module wherever it meets the elastic one, whose weights are thus never copied
    replaced: dict[int, nn.Module] = {}
    for site in sites:
        elastic = model.get_submodule(site.name)
        assert isinstance(elastic, ElasticSite)
        replaced[id(elastic)] = small_site(site, elastic, widths[site.name])
    norm = last_norm(model)
    if norm is not None:
        replaced[id(norm)] = plain_norm(norm, shift)
    with torch.no_grad():
        small: nn.Module = copy.deepcopy(model, memo=replaced)
    return small.eval()


@torch.no_grad()
def small_site(site: Site, elastic: ElasticSite, width: int) -> nn.Module:
    """One stock layer at a width, or the constant that is left at width 0."""
    if width == 0:
        bias = elastic.out_bias_at(0)
        constant = build_site({"constant": 0 if bias is None else site.dim}, site.dim, elastic, "meta")
        return constant if bias is None else _fill(constant, {"bias": bias})
    weights = elastic.weights_at(width)
    in_bias, out_bias = weights.in_bias is not None, weights.out_bias is not None
    if isinstance(elastic, ElasticAttention):
        first, second = "qkv", "proj"
        shape = {"num_heads": site.heads, "head_dim": width, "qkv_bias": in_bias, "proj_bias": out_bias}
    else:
        first, second = "fc1", "fc2"
        shape = {"hidden_features": width, "fc1_bias": in_bias, "fc2_bias": out_bias}
    layer = build_site(shape, site.dim, elastic, "meta")
    names = (f"{first}.weight", f"{first}.bias", f"{second}.weight", f"{second}.bias")
    return _fill(layer, {name: t for name, t in zip(names, weights, strict=True) if t is not None})


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Gives a layer built without storage its own copies of the tensors."""
    layer.load_state_dict(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, assign=True
    )
    return layer.requires_grad_(True)
