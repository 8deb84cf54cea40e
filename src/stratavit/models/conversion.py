"""Both ends of a super-network: a plain model made elastic, and a small model that knows where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from stratavit.elastic.site import Site
from stratavit.elastic.token_places import SUFFIX, TokenPlace, place_of
from stratavit.elastic.tokens import ElasticMergingBlock, merging_blocks
from stratavit.errors import UnsupportedModelError
from stratavit.models import architecture
from stratavit.models.changes import check_small, form_of
from stratavit.models.cost import CostModel, cost_model
from stratavit.models.equality import Subject, check_equal
from stratavit.models.extraction import small_model
from stratavit.models.families import blocks_of, elastic_sites, find_sites, last_norm, merging, stages
from stratavit.models.final_mean import Shift
from stratavit.models.freezing import set_frozen
from stratavit.models.source_checks import check, check_layers, drop_own_routines, whole_copy
from stratavit.utils.classifier import with_plain_head


class Elastic(NamedTuple):
    """A model made elastic, and what is known of it."""

    model: Any  # its attention and MLP modules are elastic
    sites: tuple[Site, ...]
    uncut: dict[str, str]  # name -> reason of modules that stay as they are
    description: dict[str, Any]  # see `architecture.describe`
    data_config: dict[str, Any]
    cost: CostModel
    form: tuple[Any, ...]  # see `changes.form_of`
    shift: Shift  # hook of the last norm


def elastic_model(
    source: nn.Module,
    data_config: Mapping[str, Any] | None,
    embedding: bool | None,
    description: Mapping[str, Any] | None = None,
    compare: bool = True,
) -> Elastic:
    """A copy of a timm model whose attention and MLP modules are elastic; methods set on instances are dropped.

    Args:
        source, data_config, embedding: See `SuperNet`, also for errors.
        description: Of a model that was just built from it, so that nothing else is in it.
        compare: Run one image to see that the copy has the outputs of the model.
    """
    check(source)
    plain = with_plain_head(source)
    if merging_blocks(plain):
        raise UnsupportedModelError(
            "this small model already merges tokens; make a super-network of the dense model, or extract this size by "
            "axes='width'"
        )
    sites, rebuilt = find_sites(plain), None
    if description is None:
        description, rebuilt = architecture.described_and_built(plain)
    data_config = architecture.merged_data_config(plain, data_config)
    model: Any = whole_copy(plain)
    drop_own_routines(model)
    model.embedding = bool(getattr(source, "embedding", False) if embedding is None else embedding)
    modules, uncut = elastic_sites(model)
    for name, module in modules.items():
        model.set_submodule(name, module)
    if rebuilt is not None and compare:
        rebuilt = architecture.filled(rebuilt, plain)
        ours = Subject(rebuilt, rebuilt), Subject(model, stages(model).outputs)
        check_equal("cut", UnsupportedModelError, Subject(source, source), ours, data_config["input_size"])
    description = {**description, **({"embedding": True} if model.embedding else {})}
    cost, shift, norm = cost_model(model, sites, data_config["input_size"], uncut), Shift(), last_norm(model)
    if getattr(plain, "origin", None) is None:  # transformers' classes have no block that merges tokens
        cost = replace(cost, places=make_merging(model, next(iter(cost.tokens.values()))))
    if norm is not None:
        norm.register_forward_hook(shift)
    return Elastic(model, sites, uncut, description, data_config, cost, form_of(model), shift)


def make_merging(model: Any, tokens: int) -> tuple[TokenPlace, ...]:
    """Makes the blocks of a model able to merge tokens, where they can; the places, for images of so many tokens."""
    prefix, names = merging(model), blocks_of(model)
    if isinstance(prefix, str):
        return ()
    patches = tokens - prefix
    for name in names:
        block = ElasticMergingBlock(model.get_submodule(name), prefix, last=name == names[-1], full=patches)
        model.set_submodule(name, block)
    return tuple(place_of(name, patches, prefix) for name in names)


def final_shift(net: Any, widths: Mapping[str, int]) -> Tensor | None:
    """What is added to the last norm's bias of a `SuperNet` at widths of every site, ``[C]``; None for nothing."""
    if net.final_mean is None or net.compensation != "full" or widths == net.resolve(None):
        return None
    channels = {name: width for name, width in widths.items() if not name.endswith(SUFFIX)}
    shift: Tensor = net.final_mean.at(net.cost.macs(channels) / net.cost.macs())
    return shift


def small_at(net: Any, widths: Mapping[str, int]) -> nn.Module:
    """The small timm model of a `SuperNet` at widths of every site; it knows where it comes from."""
    check_layers(net.model)
    small: Any = small_model(net.model, net.sites, widths, final_shift(net, widths), net.cost.places)
    small.provenance = {
        "super_network": net.provenance,
        "spec": dict(widths),
        "macs": net.macs(widths),
        "params": net.params(widths),
        "dense_macs": net.macs(),
        "dense_params": net.params(),
        "dense_spec": dict(net.resolve(None)),
    }
    small.origin, small.embedding, small.data_config = net.origin, net.embedding, dict(net.data_config)
    small.source_args = dict(net.description["args"])
    if net.frozen_for_serving:  # see `SuperNet.specialise`
        set_frozen(small, net.frozen)
    check_small(net, small, widths)
    return small
