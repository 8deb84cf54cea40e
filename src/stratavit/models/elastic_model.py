"""A plain model made elastic: what a super-network is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from stratavit.elastic.site import Site
from stratavit.elastic.token_places import TokenPlace, place_of
from stratavit.elastic.tokens import ElasticMergingBlock, merging_blocks
from stratavit.errors import UnsupportedModelError
from stratavit.models import architecture
from stratavit.models.changes import form_of
from stratavit.models.cost import CostModel, cost_model
from stratavit.models.families import blocks_of, elastic_sites, find_sites, last_norm, merging, reads_patches, stages
from stratavit.models.final_mean import Shift
from stratavit.models.output_checks import Subject, check_same_outputs
from stratavit.models.source_checks import check, drop_own_routines, whole_copy
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
    whole_heads: bool = False,
) -> Elastic:
    """A copy of a timm model whose attention and MLP modules are elastic; methods set on instances are dropped.

    Args:
        source, data_config, embedding: See `SuperNet`, also for errors.
        description: Of a model that was just built from it, so that nothing else is in it.
        compare: Run one image to see that the copy has the outputs of the model.
        whole_heads: See `SuperNet`; a description says so, too.
    """
    check(source)
    plain = with_plain_head(source)
    if merging_blocks(plain):
        raise UnsupportedModelError(
            "this small model already merges tokens; make a super-network of the dense model, or extract this size by "
            "axes='width'"
        )
    whole_heads = whole_heads or bool((description or {}).get("whole_heads"))
    if whole_heads and getattr(plain, "origin", None) is not None:
        raise UnsupportedModelError("whole_heads: models of transformers have equally many heads; convert timm's model")
    sites, rebuilt = find_sites(plain, whole_heads), None
    if description is None:
        description, rebuilt = architecture.described_and_built(plain)
    data_config = architecture.merged_data_config(plain, data_config)
    model: Any = whole_copy(plain)
    drop_own_routines(model)
    model.embedding = bool(getattr(source, "embedding", False) if embedding is None else embedding)
    model.whole_heads = whole_heads
    modules, uncut = elastic_sites(model, whole_heads)
    for name, module in modules.items():
        model.set_submodule(name, module)
    if rebuilt is not None and compare:
        rebuilt = architecture.filled(rebuilt, plain)
        ours = Subject(rebuilt, rebuilt), Subject(model, stages(model).outputs)
        check_same_outputs("cut", UnsupportedModelError, Subject(source, source), ours, data_config["input_size"])
    facts = {"embedding": model.embedding, "whole_heads": whole_heads}
    kept = {key: value for key, value in description.items() if key not in facts}  # of a small model they may differ
    description = {**kept, **{name: True for name, holds in facts.items() if holds}}
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
    unread = not reads_patches(model)
    return tuple(place_of(name, patches, prefix, unread and name == names[-1]) for name in names)
