"""The small model of a super-network: cut out of it, the final mean shifted, and a record of its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.short_blocks import can_be_short, folds_into, is_scaled
from stratavit.models.changes import check_small
from stratavit.models.cost import site_params
from stratavit.models.extraction import cut_model
from stratavit.models.freezing import set_frozen
from stratavit.models.number_types import in_type
from stratavit.models.source_checks import check_layers
from stratavit.spec import TOKENS
from stratavit.utils.model import model_device


def final_shift(net: Any, widths: Mapping[str, int]) -> Tensor | None:
    """What is added to the last norm's bias of a `SuperNet` at widths of every site, ``[C]``; None for nothing."""
    if net.final_mean is None or net.compensation != "full" or widths == net.resolve(None):
        return None
    if net.final_mean.vectors.device != model_device(net.model):  # a copy in every pass otherwise
        net.final_mean = net.final_mean.to(model_device(net.model))
    channels = {name: width for name, width in widths.items() if not name.endswith(TOKENS)}
    shift: Tensor = net.final_mean.at(net.cost.macs(channels) / net.cost.macs())
    return shift


def params_at(net: Any, widths: Mapping[str, int], folded: bool = True) -> int:
    """Parameters of the small model of a `SuperNet` at widths of every site.

    Args:
        net, widths: See `small_at`.
        folded: Constants become part of other biases, see `short_blocks.fold_constants`; not in a part of a host.
    """
    biased = net.compensation != "none"
    calibrated = all(module.channel_mean.numel() for module in net.elastic.values())
    count: int = net.cost.params(widths, biased, corrected=biased and calibrated)
    return count - _folded_params(net, widths, biased, biased and calibrated) if folded else count


def _folded_params(net: Any, widths: Mapping[str, int], biased: bool, corrected: bool) -> int:
    """Parameters of constants that are part of other biases, see `short_blocks.fold_constants`."""
    sites, count = {site.name: site for site in net.sites}, 0
    for name in {site.rpartition(".")[0] for site, width in widths.items() if site.endswith(".mlp") and width == 0}:
        block, mlp, attention = net.model.get_submodule(name), sites[f"{name}.mlp"], sites.get(f"{name}.attn")
        if not can_be_short(block) or is_scaled(block):
            continue
        if attention is None:
            there = folds_into(block.attn)
        else:
            width = widths[attention.name]
            there = attention.out_bias or (corrected and width < attention.width)
            there = there and (biased or width > 0)
        count += site_params(mlp, 0, biased, corrected) * there
    return count


def small_at(net: Any, widths: Mapping[str, int], dtype: str | None = None) -> nn.Module:
    """The small timm model of a `SuperNet` at widths of every site; it knows where it comes from.

    Args:
        net, widths: The super-network, and a width for every site.
        dtype: Of the weights; None is the super-network's own.

    Raises:
        StrataViTError: The model does not compute nearly the same in that type, see `number_types.in_type`.
    """
    check_layers(net.model)
    small: Any = cut_model(net.model, net.sites, widths, final_shift(net, widths), net.cost.places)
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
    small.whole_heads = getattr(net.model, "whole_heads", False)
    small.source_args = dict(net.description["args"])
    if net.frozen_for_serving:  # see `SuperNet.specialise`
        set_frozen(small, net.frozen)
    check_small(net, small, widths)
    return small if dtype is None else in_type(small, getattr(torch, dtype))
