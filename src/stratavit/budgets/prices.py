"""What a unit costs in milliseconds on this device, for a dropout list that follows latency in place of MACs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import linear_regression

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.evaluation import latency
from stratavit.evaluation.latency import Setting
from stratavit.models.cost import CostModel, Price
from stratavit.models.extraction import small_site
from stratavit.utils.progress import track

ROUNDS = 3
QUARTERS = 4


def priced(
    cost: CostModel, elastic: Mapping[str, ElasticSite], price: str, setting: Setting | None = None
) -> CostModel:
    """The cost model that a dropout list weighs importance with.

    Args:
        cost: Of the model, in MACs.
        elastic: Site name -> module.
        price: ``macs`` or ``latency``.
        setting: For latency; one image, eager, if None.

    Raises:
        StrataViTError: An unknown price, or latency cannot be measured.
    """
    if price not in ("macs", "latency"):
        raise StrataViTError(f"price: expected 'macs' or 'latency', got {price!r}")
    if price == "macs":
        return cost
    return dataclasses.replace(cost, prices=latency_prices(cost, elastic, setting or Setting()))


def latency_prices(cost: CostModel, elastic: Mapping[str, ElasticSite], setting: Setting) -> dict[str, Price]:
    """Times the extracted layers of every kind of site at quarters of its width, and fits a line.

    A line, because single units are far below what a clock can tell apart. Sites that are alike are timed once.

    Returns:
        Site name -> milliseconds per batch as soon as there is one coordinate, and of each coordinate.

    Raises:
        StrataViTError: A layer cannot be run in this setting, or is not slower when it is wider.
    """
    alike: dict[tuple[str, int, int, int, int], list[Site]] = {}
    for site in cost.sites:
        alike.setdefault((site.kind, site.dim, site.heads, site.width, cost.tokens[site.name]), []).append(site)
    prices: dict[str, Price] = {}
    for same in track(list(alike.values()), "time the layers"):
        name = same[0].name
        tokens, seen = cost.tokens[name], cost.context[name]  # a window of an image is as an image to the layer
        several = dataclasses.replace(setting, batch_size=setting.batch_size * (tokens // seen))
        found = _line(same[0].with_whole_scores(), elastic[name], (seen, same[0].dim), several)
        prices |= {site.name: found for site in same}
    return prices


def _line(site: Site, elastic: ElasticSite, shape: tuple[int, int], setting: Setting) -> Price:
    ends = len(site.steps) - 1
    widths = sorted({site.steps[max(1, ends * quarter // QUARTERS)] for quarter in range(1, QUARTERS + 1)})
    layers = [small_site(site, elastic, width) for width in widths]
    runs = [latency.runner(layer, shape, setting) for layer in layers]
    return fit(site.name, widths, [found.median_ms for found in latency.in_turns(runs, setting, ROUNDS)])


def fit(name: str, widths: Sequence[int], milliseconds: Sequence[float]) -> Price:
    """The line through times at widths, by least squares; the start is at least 0.

    Raises:
        StrataViTError: It does not rise.
    """
    start = -1.0
    if len(widths) > 1:
        slope, start = linear_regression(widths, milliseconds)
    if start < 0:  # through the origin
        start = 0.0
        slope = sum(x * y for x, y in zip(widths, milliseconds, strict=True)) / sum(x * x for x in widths)
    if not slope > 0:
        raise StrataViTError(
            f"latency: {name} is not slower when it is wider ({', '.join(f'{ms:.3g}' for ms in milliseconds)} ms at "
            f"widths {', '.join(map(str, widths))}); give a larger batch, or let the list follow MACs"
        )
    return Price(start, slope)
