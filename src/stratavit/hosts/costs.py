"""What a part costs: tokens of every site and MACs of everything else, counted in one pass over one image."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import Site
from stratavit.models.cost import CostModel, linear_macs
from stratavit.utils.model import temporarily


class _Tokens:
    """An observer that counts the tokens that a site reads."""

    def __init__(self) -> None:
        self.tokens, self.context = 0, 0

    def features(self, features: Tensor) -> None:
        """Nothing: `inputs_of_out` comes for attention and MLPs alike."""

    def pairs(self, products: object) -> None:
        """Nothing."""

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
    with watching:
        fixed = linear_macs(model, tuple(image.shape[1:]), inside, image=image)
    params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    tokens = {name: one.tokens for name, one in seen.items()}
    return CostModel(sites, tokens, {name: one.context for name, one in seen.items()}, fixed, params)
