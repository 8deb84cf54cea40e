"""What a sub-network costs: MACs in both conventions, and parameters. Exact, by arithmetic alone.

The linear count adds patch embedding, qkv, proj, fc1, fc2 and head (and patch merging), without biases and norms; it is
what budgets mean. ``attention=True`` adds the two products QK^T and AV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratavit.elastic.layers import ATTENTION, describe_layer
from stratavit.elastic.site import Site
from stratavit.utils.model import eval_mode, model_device, model_dtype


class Price(NamedTuple):
    """What a site costs where MACs are not what counts: once it has any width, and for each coordinate."""

    start: float
    each: float


@dataclass(frozen=True)
class CostModel:
    """Cost of every sub-network of one model.

    Attributes:
        sites: The modules that can be cut.
        tokens: Site name -> tokens per image that it reads, at the model's input size.
        context: Site name -> tokens that each of them attends to: all, or those of its window.
        fixed_macs: MACs per image outside the sites.
        fixed_params: Parameters outside the sites.
        prices: Site name -> what takes the place of MACs where the importance of units is weighed against their cost;
            None is MACs. Budgets stay in MACs.
    """

    sites: tuple[Site, ...]
    tokens: Mapping[str, int]
    context: Mapping[str, int]
    fixed_macs: int
    fixed_params: int
    prices: Mapping[str, Price] | None = None

    def price(self, site: Site, width: int) -> float:
        """What importance is weighed against: MACs per image of a site at a width, or its price."""
        if self.prices is None:
            return self.site_macs(site, width)
        price = self.prices[site.name]
        return price.start + price.each * width if width else 0.0

    def site_macs(self, site: Site, width: int, attention: bool = False) -> int:
        """MACs per image of one site at a width."""
        products = self.context[site.name] if attention else 0
        return site_macs(site, width, self.tokens[site.name], products)

    def each(self, site: Site) -> int:
        """MACs per image of one more coordinate of a site that has some."""
        return self.site_macs(site, 2) - self.site_macs(site, 1)

    def macs(self, widths: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """Multiply-accumulates per image; sites that are not named count at full width."""
        total = self.fixed_macs
        for site in self.sites:
            width = site.width if widths is None else widths.get(site.name, site.width)
            total += self.site_macs(site, width, attention)
        return total

    def params(self, widths: Mapping[str, int] | None = None, biased: bool = True, corrected: bool = True) -> int:
        """Parameters of the extracted sub-network.

        Args:
            widths: Kept widths; sites that are not named count at full width.
            biased: A site cut to width 0 keeps the bias of its `proj` / `fc2` (else nothing at all).
            corrected: A cut site has a bias there even if the full one has none.
        """
        total = self.fixed_params
        for site in self.sites:
            width = site.width if widths is None else widths.get(site.name, site.width)
            total += site_params(site, width, biased, corrected)
        return total


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
    qk = 2 * site.heads * site.qk_width  # rows of q and k where they stay whole
    linear = tokens * site.dim * ((site.maps + 1) * site.heads * width + qk)
    if site.kind == "mlp" or not context:
        return linear
    return linear + tokens * context * site.heads * (width + (site.qk_width or width))


def site_params(site: Site, width: int, biased: bool, corrected: bool) -> int:
    """Parameters of one site at a width."""
    out_bias = site.out_bias or (corrected and width < site.width)
    if width == 0:
        return site.dim if biased and out_bias else 0
    channels = site.heads * width
    return ((site.maps + 1) * site.dim + site.in_biases) * channels + site.dim * out_bias + site.fixed_params


def cost_model(model: nn.Module, sites: tuple[Site, ...], image_size: tuple[int, int, int]) -> CostModel:
    """Measures what does not change with widths by one pass over a blank image.

    Args:
        model: The model, at full width.
        sites: Its sites.
        image_size: Channels, height, width of an input image.
    """
    tokens: dict[str, int] = {}
    context: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        context[name] = inputs[0].shape[-2]
        tokens[name] = inputs[0].numel() // inputs[0].shape[-1]  # windows and rows of the one image, too

    inside = tuple(site.name + "." for site in sites)
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(partial(note, site.name), prepend=True)
        for site in sites
    ]
    try:
        fixed_macs = linear_macs(model, image_size, without=inside)
    finally:
        for handle in handles:
            handle.remove()
    fixed_params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    return CostModel(sites, tokens, context, fixed_macs, fixed_params)


def linear_macs(
    model: nn.Module, image_size: tuple[int, int, int], without: tuple[str, ...] = (), attention: bool = False
) -> int:
    """MACs per image of the linear maps and convolutions, counted in a pass over a blank image.

    Args:
        model: Any model from images.
        image_size: Channels, height, width of an input image.
        without: Beginnings of the names of modules that do not count.
        attention: Add the products QK^T and AV.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Linear | nn.Conv2d)
        total += output.numel() * module.weight[0].numel()

    def count_functional(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if (
            getattr(module, "q_bias", None) is not None and not module.qkv_bias_separate
        ):  # qkv is not called as a module
            total += inputs[0].numel() // inputs[0].shape[-1] * module.qkv.weight.numel()

    def count_products(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        numbers = describe_layer("", module)
        widths = numbers.get("qk_dim", 0) + numbers.get("v_dim", 0) or 2 * numbers["head_dim"]
        total += inputs[0].numel() // inputs[0].shape[-1] * inputs[0].shape[-2] * numbers["num_heads"] * widths

    counted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not (without and name.startswith(without))
        and ".cpb_mlp." not in name  # positions, the same for all images
    ]
    handles = [module.register_forward_hook(count) for module in counted]
    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, ATTENTION)]
    handles += [
        module.register_forward_hook(count_functional)
        for name, module in attentions
        if not (without and f"{name}.".startswith(without))
    ]
    if attention:
        handles += [module.register_forward_hook(count_products) for _, module in attentions]
    try:
        with eval_mode(model), torch.inference_mode():
            model(torch.zeros(1, *image_size, device=model_device(model), dtype=model_dtype(model)))
    finally:
        for handle in handles:
            handle.remove()
    return total
