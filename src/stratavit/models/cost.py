"""What a sub-network costs: MACs in both conventions, and parameters. Exact, by arithmetic alone.

The linear count adds patch embedding, qkv, proj, fc1, fc2 and head (and patch merging), without biases and norms; it is
what budgets mean. ``attention=True`` adds the two products QK^T and AV.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratavit.elastic.layers import ATTENTION, describe_layer, reshapes, tokens_in_view
from stratavit.elastic.site import Site
from stratavit.elastic.token_places import TokenPlace, tokens_along
from stratavit.utils.model import eval_mode, model_device, model_dtype

POSITIONS = {"cpb_mlp", "rel_pos", "shared_rel_pos", "meta_mlp"}  # modules that compute the same for all images


class Price(NamedTuple):
    """What a site costs where MACs are not what counts: once it has any width, and for each coordinate."""

    start: float
    each: float


@dataclass(frozen=True)
class CostModel:
    """Cost of every sub-network of one model; sites that `widths` does not name count at full width.

    Attributes:
        sites: The modules that can be cut.
        tokens: Site name -> tokens per image that it reads, at the model's input size.
        context: Site name -> tokens that each of them attends to: all, or those of its window.
        fixed_macs: MACs per image outside the sites.
        fixed_params: Parameters outside the sites.
        uncut: Attention and MLP modules that are not cut -> their part of `fixed_macs`.
        places: Where tokens can be merged, in order of execution.
        prices: Site name -> what takes the place of MACs where the importance of units is weighed against their cost;
            None is MACs. Budgets stay in MACs.
    """

    sites: tuple[Site, ...]
    tokens: Mapping[str, int]
    context: Mapping[str, int]
    fixed_macs: int
    fixed_params: int
    prices: Mapping[str, Price] | None = None
    uncut: Mapping[str, int] = field(default_factory=dict)
    places: tuple[TokenPlace, ...] = ()

    @property
    def patches(self) -> int:
        """Patch tokens of an image of the model's input size, where tokens can be merged."""
        return next(iter(self.tokens.values())) - self.places[0].prefix

    def at_tokens(self, widths: Mapping[str, int]) -> CostModel:
        """The cost of networks that merge tokens as a spec says; every place that it does not name passes all on."""
        if not any(place.name in widths for place in self.places):
            return self
        tokens, context = dict(self.tokens), dict(self.context)
        prefix, fixed = self.places[0].prefix, self.fixed_macs
        before = prefix + self.patches
        for block, counts in tokens_along(self.places, widths, self.patches).items():
            for leaf, count in zip(("attn", "mlp"), counts, strict=True):
                name, left = f"{block}.{leaf}", prefix + count
                if name in tokens:
                    tokens[name] = context[name] = left
                fixed -= self.uncut.get(name, 0) // before * (before - left)
        return replace(self, tokens=tokens, context=context, fixed_macs=fixed, places=())

    def price(self, site: Site, width: int) -> float:
        """What importance is weighed against: MACs per image of a site at a width, or its price.

        Without those of rotation pairs, whose importance is not known: that of a unit is of v.
        """
        if self.prices is None:
            return self.site_macs(site.with_whole_scores(), width)
        price = self.prices[site.name]
        return price.start + price.each * width if width else 0.0

    def site_macs(self, site: Site, width: int, attention: bool = False) -> int:
        """MACs per image of one site at a width."""
        return site_macs(site, width, self.tokens[site.name], self.context[site.name] if attention else 0)

    def each(self, site: Site) -> int:
        """MACs per image of one more coordinate of a site that has some."""
        return self.site_macs(site, 2) - self.site_macs(site, 1)

    def macs(self, widths: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """Multiply-accumulates per image of the extracted sub-network; tokens that are merged away do not count."""
        cost = self.at_tokens(widths or {})
        return cost.fixed_macs + sum(cost.site_macs(site, width, attention) for site, width in self._all(widths))

    def params(self, widths: Mapping[str, int] | None = None, biased: bool = True, corrected: bool = True) -> int:
        """Parameters of the extracted sub-network.

        Args:
            widths: Kept widths.
            biased: A site cut to width 0 keeps the bias of its `proj` / `fc2` (else nothing at all).
            corrected: A cut site has a bias there even if the full one has none.
        """
        return self.fixed_params + sum(site_params(site, width, biased, corrected) for site, width in self._all(widths))

    def _all(self, widths: Mapping[str, int] | None) -> Iterator[tuple[Site, int]]:
        yield from ((site, (widths or {}).get(site.name, site.width)) for site in self.sites)


def site_macs(site: Site, width: int, tokens: int, context: int = 0) -> int:
    """MACs per image of one site at a width.

    Args:
        site: The site.
        width: Kept width.
        tokens: Tokens per image.
        context: Tokens that each attends to, if the products QK^T and AV are to count.
    """
    if width == 0:
        return 0
    scores = site.qk_at(width)
    qk = 2 * scores if site.qk_width else 0  # rows of q and k where they are not cut along with v
    linear = tokens * site.dim * site.heads * ((site.maps + 1) * width + qk)
    products = 0 if site.kind == "mlp" else tokens * context * site.heads * (width + scores)
    return linear + products


def site_params(site: Site, width: int, biased: bool, corrected: bool) -> int:
    """Parameters of one site at a width."""
    out_bias = site.out_bias or (corrected and width < site.width)
    if width == 0:
        return site.dim if biased and out_bias else 0
    channels, rest = site.heads * width, site.fixed_params + site.dim * out_bias
    if site.rotary:
        rest += (2 * site.dim + site.qk_biases) * site.heads * site.qk_at(width)
    return ((site.maps + 1) * site.dim + site.in_biases) * channels + rest


def cost_model(
    model: nn.Module,
    sites: tuple[Site, ...],
    image_size: tuple[int, int, int],
    uncut: Iterable[str] = (),
    places: tuple[TokenPlace, ...] = (),
) -> CostModel:
    """Measures what does not change with widths by one pass over a blank image.

    Args:
        model: The model, at full width.
        sites: Its sites.
        image_size: Channels, height, width of an input image.
        uncut: Names of attention and MLP modules that are not cut.
        places: See `CostModel`.
    """
    tokens: dict[str, int] = {}
    context: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        context[name] = tokens_in_view(module, inputs[0])
        tokens[name] = _tokens(inputs)

    inside = tuple(site.name + "." for site in sites)
    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.name)
            stack.enter_context(module.register_forward_pre_hook(partial(note, site.name), prepend=True))
        macs = macs_by_module(model, image_size, without=inside)
    fixed_params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    left = {leaf: sum(n for name, n in macs.items() if name.startswith(f"{leaf}.")) for leaf in uncut}
    return CostModel(sites, tokens, context, sum(macs.values()), fixed_params, uncut=left, places=places)


def _tokens(inputs: tuple[Tensor, ...]) -> int:
    """Tokens of one image that a module reads, of all its windows and rows."""
    return inputs[0].numel() // inputs[0].shape[-1]


def linear_macs(
    model: nn.Module,
    image_size: tuple[int, ...],
    without: tuple[str, ...] = (),
    attention: bool = False,
    image: Tensor | None = None,
) -> int:
    """MACs per image of the linear maps and convolutions, counted in a pass over an image.

    Args:
        model: Any model from images.
        image_size: Channels, height, width of an input image.
        without: Beginnings of the names of modules that do not count.
        attention: Add the products QK^T and AV.
        image: ``[1, *image_size]``; blank if None.
    """
    return sum(macs_by_module(model, image_size, without, attention, image).values())


def macs_by_module(
    model: nn.Module,
    image_size: tuple[int, ...],
    without: tuple[str, ...] = (),
    attention: bool = False,
    image: Tensor | None = None,
) -> dict[str, int]:
    """The same by name of the module that has them, see `linear_macs`."""
    found: dict[str, int] = defaultdict(int)

    if image is None:
        image = torch.zeros(1, *image_size, device=model_device(model), dtype=model_dtype(model))

    def count(name: str, module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Linear):  # whose output may be padded
            found[name] += output.numel() // output.shape[-1] * module.weight.numel()
            return
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            found[name] += output.numel() * module.weight[0].numel()
            return
        if isinstance(module, nn.MultiheadAttention):
            query, key = (*inputs, *(named[key] for key in ("query", "key") if key in named))[:2]
            found[name] += 2 * (_tokens((query,)) + _tokens((key,))) * module.embed_dim**2
            return
        if (
            getattr(module, "q_bias", None) is not None and not module.qkv_bias_separate
        ):  # qkv is not called as a module
            found[name + ".qkv"] += _tokens(inputs) * module.qkv.weight.numel()
        if attention and not reshapes(module):  # those stay uncut, and their products are never counted
            numbers = describe_layer("", module)
            widths = numbers.get("qk_dim", 0) + numbers.get("v_dim", 0) or 2 * numbers["head_dim"]
            found[name] += _tokens(inputs) * tokens_in_view(module, inputs[0]) * numbers["num_heads"] * widths

    with ExitStack() as stack:
        for name, module in model.named_modules():
            known = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, *ATTENTION)
            counts = isinstance(module, known) and not f"{name}.".startswith(without)
            if counts and POSITIONS.isdisjoint(name.split(".")):
                stack.enter_context(module.register_forward_hook(partial(count, name), with_kwargs=True))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        model(image)
    return found
