"""What a part costs: tokens of every site and MACs of everything else, counted in one pass over one image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import Site
from stratavit.models.cost import CostModel
from stratavit.utils.model import eval_mode, temporarily


class _Tokens:
    """An observer that counts the tokens that a site reads."""

    def __init__(self) -> None:
        self.tokens, self.context = 0, 0

    def features(self, features: Tensor) -> None:
        """Nothing: `inputs_of_out` comes for attention and MLPs alike."""

    def inputs_of_out(self, features: Tensor) -> None:
        """``[B, N, ...]`` of one image, all its windows in B."""
        self.tokens, self.context = features[..., 0].numel(), features.shape[-2]

    def outputs(self, outputs: Tensor) -> None:
        """Nothing."""


def part_cost(
    model: nn.Module, elastic: Mapping[str, ElasticSite], sites: tuple[Site, ...], image: Tensor
) -> CostModel:
    """The cost of every sub-network of a part, per image.

    Args:
        model: A `HostedPart` whose sites are elastic.
        elastic, sites: Its sites.
        image: One of those that the host gave it, ``[1, C, H, W]``.
    """
    seen = {name: _Tokens() for name in elastic}
    inside = tuple(f"{name}." for name in elastic)
    watching = temporarily("observer", {site: seen[name] for name, site in elastic.items()})
    with watching, torch.no_grad():
        fixed = macs_outside(model, image, inside)
    params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    tokens = {name: one.tokens for name, one in seen.items()}
    return CostModel(sites, tokens, {name: one.context for name, one in seen.items()}, fixed, params)


def macs_outside(model: nn.Module, image: Tensor, without: tuple[str, ...] = ()) -> int:
    """MACs of one image in linear layers, convolutions and torch's attention, by a pass with hooks.

    Args:
        model: What is run.
        image: ``[1, C, H, W]``.
        without: Beginnings of the names of modules that do not count.
    """
    found: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key = (_argument(args, kwargs, n, name) for n, name in enumerate(("query", "key")))
            rows, other = query.numel() // query.shape[-1], key.numel() // key.shape[-1]
            found.append(2 * (rows + other) * module.embed_dim**2)
        elif isinstance(module, nn.Linear):  # whose output may be padded
            found.append(output.numel() // output.shape[-1] * module.weight.numel())
        else:
            found.append(output.numel() * module.weight[0].numel())

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and not f"{name}.".startswith(without):
                stack.enter_context(module.register_forward_hook(partial(count), with_kwargs=True))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        model(image)
    return sum(found)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int, name: str) -> Tensor:
    value: Tensor = args[number] if len(args) > number else kwargs[name]
    return value
