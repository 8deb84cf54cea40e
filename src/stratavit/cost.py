"""What a sub-network costs: MACs in both conventions, and parameters. Exact, by arithmetic alone.

The linear count adds patch embedding, qkv, proj, fc1, fc2 and head, without biases and norms; it is
what budgets mean. ``attention=True`` adds the two products QK^T and AV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers import Attention
from torch import Tensor, nn

from stratavit.structure import Site, eval_mode, model_device, model_dtype


class Price(NamedTuple):
    """What a site costs where MACs are not what counts: once it has any width, and for each coordinate."""

    start: float
    each: float


@dataclass(frozen=True)
class CostModel:
    """Cost of every sub-network of one model.

    Attributes:
        sites: The modules that can be cut.
        tokens: Tokens N per image at the model's input size.
        fixed_macs: MACs per image outside the sites.
        fixed_params: Parameters outside the sites.
        prices: Site name -> what takes the place of MACs where the importance of units is weighed against their cost;
            None is MACs. Budgets stay in MACs.
    """

    sites: tuple[Site, ...]
    tokens: int
    fixed_macs: int
    fixed_params: int
    prices: Mapping[str, Price] | None = None

    def price(self, site: Site, width: int) -> float:
        """What importance is weighed against: MACs per image of a site at a width, or its price."""
        if self.prices is None:
            return site_macs(site, width, self.tokens)
        price = self.prices[site.name]
        return price.start + price.each * width if width else 0.0

    def macs(self, widths: Mapping[str, int] | None = None, attention: bool = False) -> int:
        """Multiply-accumulates per image; sites that are not named count at full width."""
        total = self.fixed_macs
        for site in self.sites:
            width = site.width if widths is None else widths.get(site.name, site.width)
            total += site_macs(site, width, self.tokens, attention)
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


def site_macs(site: Site, width: int, tokens: int, attention: bool = False) -> int:
    """MACs per image of one site at a width."""
    if site.kind == "mlp":
        return 2 * tokens * site.dim * width
    products = 2 * tokens * tokens * site.heads * width if attention else 0
    return 4 * tokens * site.dim * site.heads * width + products


def site_params(site: Site, width: int, biased: bool, corrected: bool) -> int:
    """Parameters of one site at a width."""
    out_bias = site.out_bias or (corrected and width < site.width)
    if width == 0:
        return site.dim if biased and out_bias else 0
    maps = 3 if site.kind == "attention" else 1  # q, k and v, or fc1
    channels = site.heads * width
    return (maps + 1) * channels * site.dim + maps * channels * site.in_bias + site.dim * out_bias


def cost_model(model: nn.Module, sites: tuple[Site, ...], image_size: tuple[int, int, int]) -> CostModel:
    """Measures what does not change with widths by one pass over a blank image.

    Args:
        model: The model, at full width.
        sites: Its sites.
        image_size: Channels, height, width of an input image.
    """
    tokens = 0

    def tokens_of(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        tokens = inputs[0].shape[1]

    inside = tuple(site.name + "." for site in sites)
    handle = model.get_submodule(sites[0].name).register_forward_pre_hook(tokens_of)
    try:
        fixed_macs = linear_macs(model, image_size, without=inside)
    finally:
        handle.remove()
    fixed_params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    return CostModel(sites, tokens, fixed_macs, fixed_params)


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

    def count_products(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, Attention)
        tokens = inputs[0].shape[1]
        total += 2 * tokens * tokens * module.num_heads * module.head_dim

    counted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not (without and name.startswith(without))
    ]
    handles = [module.register_forward_hook(count) for module in counted]
    if attention:
        modules = [module for module in model.modules() if isinstance(module, Attention)]
        handles += [module.register_forward_hook(count_products) for module in modules]
    try:
        with eval_mode(model), torch.inference_mode():
            model(torch.zeros(1, *image_size, device=model_device(model), dtype=model_dtype(model)))
    finally:
        for handle in handles:
            handle.remove()
    return total
