"""The attention and MLP modules that can be cut of any model, of timm or transformers, wherever they stand in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from stratavit.elastic.attention import ElasticSplit
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.layers import build_layer, describe_layer
from stratavit.elastic.rotary import ElasticRotary, cuts_pairs
from stratavit.elastic.site import Site
from stratavit.errors import ArtifactError, described, one_line, shown
from stratavit.interop.transformers.packed_sites import elastic_kind
from stratavit.interop.transformers.sites import why_unknown
from stratavit.interop.transformers.small_modules import resized, small_module
from stratavit.models.extraction import small_site
from stratavit.models.families import kind_of


def candidates(part: nn.Module) -> Iterator[tuple[str, nn.Module, type[Any]]]:
    """Name, module and elastic class of every attention and MLP module of a known kind, in order of construction."""
    inside: tuple[str, ...] = ()
    rotary = tuple(name for name, module in part.named_modules() if getattr(module, "rope", None) is not None)
    for name, module in part.named_modules():
        kind: type[Any] | None = kind_of(module) or elastic_kind(module)
        if kind is ElasticSplit and cuts_pairs(module) and name.startswith(rotary):
            kind = ElasticRotary
        if kind is not None and not (inside and name.startswith(inside)):
            inside = (*inside, f"{name}.")
            yield name, module, kind


def elastic_sites_in(part: nn.Module) -> tuple[dict[str, ElasticSite], dict[str, str]]:
    """An elastic module for every module of a part that can be cut, sharing its weights.

    Returns:
        Name -> elastic module; name -> reason for every module of a known kind that stays uncut.
    """
    found: dict[str, ElasticSite] = {}
    uncut: dict[str, str] = {}
    for name, module, kind in candidates(part):
        refused = kind.refusal(module)
        if refused is None:
            found[name] = kind(module)
        else:
            uncut[name] = f"{name}.{refused[0]}: {refused[1]}"
    for name, module in part.named_modules():
        reason, inside = why_unknown(module), name.startswith(tuple(f"{one}." for one in (*found, *uncut)))
        if reason is not None and not inside and name not in found and name not in uncut:
            uncut[name] = f"{name}: {reason}"
    return found, uncut


def small_of(site: Site, elastic: Any, width: int) -> nn.Module:
    """The module of its library that an elastic one becomes at a width."""
    return small_module(elastic, width) if hasattr(elastic, "stock") else small_site(site, elastic, width)


def sizes_of(elastic: Any, width: int, small: nn.Module) -> dict[str, Any]:
    """Plain numbers from which `resize` makes a small module of a stock one."""
    if not hasattr(elastic, "stock"):
        return describe_layer("", small)
    with torch.no_grad():
        numbers: dict[str, Any] = elastic.numbers(width, elastic.weights_at(width) if width else None)
    return numbers


def resize(model: nn.Module, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts untrained modules of other sizes into a freshly built model, in place.

    Args:
        model: As its own class builds it.
        sizes: Name of a module -> its numbers, see `sizes_of`.

    Raises:
        ArtifactError: It has no such module, or none that can be cut to such a size.
    """
    if not isinstance(sizes, Mapping):
        raise ArtifactError(f"sizes: expected the numbers of every cut module by name, got {described(sizes)}")
    for name, numbers in sizes.items():
        try:
            stock: Any = model.get_submodule(name)
        except AttributeError as error:
            raise ArtifactError(f"sizes: this {type(model).__name__} has no module {shown(name)}") from error
        try:
            small = _resized(stock, numbers)
        except Exception as error:  # numbers from a file can be wrong in any way
            raise ArtifactError(f"sizes: {shown(name)}: {one_line(error)}") from error
        model.set_submodule(name, small)


def _resized(stock: Any, numbers: Mapping[str, Any]) -> nn.Module:
    if elastic_kind(stock) is not None:
        return resized(stock, numbers["width"], bool(numbers["bias"]), numbers.get("qk"))
    if kind_of(stock) is None:
        raise ArtifactError(f"a {type(stock).__name__} is not a module that can be cut")
    full = stock.proj if hasattr(stock, "proj") else stock.fc2
    wanted = numbers.get("head_dim", numbers.get("hidden_features", numbers.get("v_dim", 0)))
    if not 0 <= wanted <= full.in_features:
        raise ArtifactError(f"expected a width up to the full one, got {described(wanted)}")
    return build_layer(numbers, full.out_features, stock, full.weight.device).to(full.weight.dtype)
