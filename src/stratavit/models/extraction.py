"""Spec -> plain small model: stock timm layers holding slices of the super-network's weights.

No search and no training: each kept weight is copied once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.layers import KEPT, build_layer
from stratavit.elastic.network import site_of
from stratavit.elastic.short_blocks import fold_constants, shorten
from stratavit.elastic.site import Site
from stratavit.elastic.token_places import TokenPlace
from stratavit.elastic.tokens import merge_at
from stratavit.models.families import blocks_of, last_norm
from stratavit.models.freezing import freeze_like
from stratavit.models.source_checks import drop_own_routines, whole_copy


@torch.inference_mode(False)
def cut_model(
    model: nn.Module,
    sites: tuple[Site, ...],
    widths: Mapping[str, int],
    shift: Tensor | None = None,
    places: tuple[TokenPlace, ...] = (),
) -> nn.Module:
    """Copies a sub-network out of a super-network's model.

    Args:
        model: The model with elastic modules; unchanged.
        sites: Its sites.
        widths: Kept width of every site.
        shift: Added to the bias of the last norm, ``[C]``.
        places: Where it can merge tokens.

    Returns:
        A timm model in eval mode that shares no storage with `model`.
    """
    # deepcopy takes the small module wherever it meets the elastic one, whose weights are thus never copied
    elastic = [site_of(model, site.name) for site in sites]
    replaced = {id(own): small_site(site, own, widths[site.name]) for site, own in zip(sites, elastic, strict=True)}
    norm = last_norm(model)
    if norm is not None:
        replaced[id(norm)] = _shifted(norm, shift)
    small = whole_copy(model, replaced)
    drop_own_routines(small)
    if places:
        keep = {
            place.block: widths[place.name] for place in places if widths.get(place.name, place.width) < place.width
        }
        merge_at(small, [place.block for place in places], keep, places[0].width, places[0].prefix)
    blocks = blocks_of(small)
    fold_constants(small, blocks)
    shorten(small, blocks)
    return small.eval()


@torch.no_grad()
def _shifted(norm: nn.Module, shift: Tensor | None) -> nn.Module:
    """A copy of the last norm without forward hooks, the shift in its bias."""
    plain = whole_copy(norm)
    plain._forward_hooks.clear()
    if shift is not None:
        plain.bias.add_(shift.to(plain.bias))  # type: ignore[operator, arg-type]
    return plain


@torch.no_grad()
def small_site(site: Site, elastic: ElasticSite, width: int) -> nn.Module:
    """One stock layer at a width, or the constant that is left at width 0."""
    if width == 0:
        bias = elastic.bias_alone()
        constant = build_layer({"constant": 0 if bias is None else site.dim}, site.dim, elastic, "meta")
        return _filled(constant, {"bias": bias}, elastic)
    weights = elastic.weights_at(width)
    layer = build_layer(elastic.numbers(width, weights), site.dim, elastic, "meta")
    return _filled(layer, elastic.tensors(weights), elastic)


def _filled(layer: nn.Module, tensors: Mapping[str, Tensor | None], elastic: ElasticSite) -> nn.Module:
    """The layer, built without storage, with its own copies of the tensors; frozen where their origin is."""
    kept = elastic.storages()
    own = {name: _owned(tensor, kept) for name, tensor in tensors.items() if tensor is not None}
    left = layer.load_state_dict(own, strict=False, assign=True)
    assert not left.unexpected_keys
    assert all(key.startswith(KEPT) for key in left.missing_keys)  # copied when the layer was built
    freeze_like(layer, elastic)
    return layer


def _owned(tensor: Tensor, kept: set[int]) -> Tensor:
    """A tensor with a storage of its own: itself if it was just computed and fills its storage, else a copy."""
    storage = tensor.untyped_storage()
    fills = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
    if fills and storage.data_ptr() not in kept and not tensor.is_inference():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
