"""How many blocks merge tokens where time counts: each merge takes time, and many small ones keep more accuracy.

Networks of full width that merge down to the same MACs at ever more places are timed on the device, in turns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stratavit.dropout_list.joint import chosen_places, default_number
from stratavit.elastic.merging import least
from stratavit.evaluation import latency
from stratavit.evaluation.latency import Setting
from stratavit.models.cost import CostModel
from stratavit.models.extraction import cut_model
from stratavit.utils.progress import track

SHARE = 0.6  # of the dense MACs, to which the timed networks merge
SLOWER = 1.05  # a number of places may take so many times the least time
ROUNDS = 3
FEW = (1, 2, 3)  # numbers that are timed besides the default


def measured_number(model: nn.Module, cost: CostModel, setting: Setting, image_size: tuple[int, int, int]) -> int:
    """The largest number of merging places, up to the default, that takes nearly the least time.

    Args:
        model: Of a super-network.
        cost: Its `places` that are free may merge.
        setting: How networks are timed.
        image_size: Channels, height, width.

    Returns:
        A number of blocks, at least 1, also where none may merge.
    """
    free = [place for place in cost.places if place.may_merge]
    if not free:
        return 1
    full = {site.name: site.width for site in cost.sites}
    most = default_number(free)
    specs = {number: even_merges(cost, number) for number in sorted({*FEW, most}) if number <= most}
    found = {number: spec for number, spec in specs.items() if spec is not None}
    models = [cut_model(model, cost.sites, {**full, **spec}, places=cost.places) for spec in found.values()]
    runs = [latency.runner(small, image_size, setting) for small in track(models, "time merging places")]
    times = [timing.median_ms for timing in latency.in_turns(runs, setting, ROUNDS)]
    shares = [cost.macs(spec) for spec in found.values()]
    return nearly_fastest({n: ms / macs for n, ms, macs in zip(found, times, shares, strict=True)})


def even_merges(cost: CostModel, number: int) -> dict[str, int] | None:
    """Tokens at so many places, each with the same share of those that it gets, within `SHARE` of the MACs.

    None if one merge at a time cannot leave out as many.
    """
    places = chosen_places([place for place in cost.places if place.may_merge], number)
    for percent in range(99, 33, -1):
        spec, now = {}, places[0].width
        for place in places:
            now = place.at_least(max(least(now), now * percent // 100))
            spec[place.name] = now
        if cost.macs(spec) <= SHARE * cost.macs():
            return spec
    return None


def nearly_fastest(times: Mapping[int, float]) -> int:
    """The largest number whose time is at most `SLOWER` times the least; 1 if nothing was timed."""
    return max((number for number, time in times.items() if time <= SLOWER * min(times.values())), default=1)
