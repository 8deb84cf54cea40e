"""Spec -> plain small model: stock timm layers holding slices of the super-network's weights.

No search and no training: each kept weight is copied once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite, site_of
from stratavit.elastic.layers import KEPT, build_layer
from stratavit.elastic.site import Site
from stratavit.models.families import last_norm
from stratavit.models.final_mean import plain_norm
from stratavit.models.freezing import freeze_like
from stratavit.models.source_checks import drop_own_routines, whole_copy


@torch.inference_mode(False)
def small_model(
    model: nn.Module, sites: tuple[Site, ...], widths: Mapping[str, int], shift: Tensor | None = None
) -> nn.Module:
    """Copies a sub-network out of a super-network's model.

    Args:
        model: The model with elastic modules; unchanged.
        sites: Its sites.
        widths: Kept width of every site.
        shift: Added to the bias of the last norm, ``[C]``.

    Returns:
        A timm model in eval mode that shares no storage with `model`.
    """
    # deepcopy takes the small module wherever it meets the elastic one, whose weights are thus never copied
    replaced: dict[int, nn.Module] = {}
    for site in sites:
        elastic = site_of(model, site.name)
        replaced[id(elastic)] = small_site(site, elastic, widths[site.name])
    norm = last_norm(model)
    if norm is not None:
        replaced[id(norm)] = plain_norm(norm, shift)
    small = whole_copy(model, replaced)
    drop_own_routines(small)
    return small.eval()


@torch.no_grad()
def small_site(site: Site, elastic: ElasticSite, width: int) -> nn.Module:
    """One stock layer at a width, or the constant that is left at width 0."""
    if width == 0:
        bias = elastic.out_bias_at(0)
        constant = build_layer({"constant": 0 if bias is None else site.dim}, site.dim, elastic, "meta")
        return constant if bias is None else _fill(constant, {"bias": bias}, elastic)
    weights = elastic.weights_at(width)
    layer = build_layer(elastic.numbers(width, weights), site.dim, elastic, "meta")
    return _fill(layer, elastic.tensors(width, weights), elastic)


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor | None], elastic: ElasticSite) -> nn.Module:
    """Gives a layer built without storage its own copies of the tensors, frozen where what they were cut from is."""
    own = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    left = layer.load_state_dict(own, strict=False, assign=True)
    assert not left.unexpected_keys
    assert all(key.startswith(KEPT) for key in left.missing_keys)  # copied when the layer was built
    freeze_like(layer, elastic)
    return layer
