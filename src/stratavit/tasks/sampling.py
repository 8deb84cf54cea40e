"""Which sub-networks a training step runs: drawn from its number alone, so that nothing is stored."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stratavit.dropout_list.strata import Strata
from stratavit.elastic.site import Site
from stratavit.models.cost import CostModel
from stratavit.spec import Spec
from stratavit.training.recipe import Sampling
from stratavit.training.task import SampledNetwork


def prefixes_of(strata: Strata, cost: CostModel, whole_groups: bool) -> list[SampledNetwork]:
    """All prefixes of a list, or only those that do not cut a merged tail in two (paper); largest first."""
    positions = strata.group_ends() if whole_groups else range(len(strata) + 1)
    specs = [strata.spec(position) for position in positions]
    return [SampledNetwork(spec, cost.macs(spec), position) for spec, position in zip(specs, positions, strict=True)]


def rounded(prefixes: Sequence[SampledNetwork], count: int, dropped: float, complete: bool) -> list[SampledNetwork]:
    """Each prefix replaced by the nearest of at most `count` of them, so that few graphs need to be compiled.

    These drop from as much as the first prefix to `dropped` MACs, in even steps: each is the first that drops so much.
    A list that grows appends some and moves none.

    Args:
        prefixes: Largest first.
        count: Sizes of the finished list, at least 2.
        dropped: MACs that the last prefix of the finished list drops.
        complete: The list is finished; if it ends before `dropped`, its last prefix is among the sizes, too.
    """
    first, last = prefixes[0].macs, prefixes[-1]
    steps = [dropped * number / max(count - 1, 1) for number in range(count)]
    reached = [[one for one in prefixes if first - one.macs >= step - 0.5] for step in steps]  # half of a MAC
    sizes = [some[0] for some in reached if some]
    if complete and not all(reached):
        sizes.append(last)
    return [min(sizes, key=lambda size: abs(size.macs - one.macs)) for one in prefixes]


def draw(sampling: Sampling, prefixes: Sequence[SampledNetwork], generator: random.Random) -> list[SampledNetwork]:
    """Draws what one batch runs of the prefixes, largest first.

    ``uniform`` over the positions (paper); ``sandwich``, the largest, a uniform one and the smallest, all on the same
    batch (three passes); ``budget``, uniform in MACs: the prefix nearest to a draw between both ends.
    """
    if sampling == "budget":
        wanted = generator.uniform(prefixes[-1].macs, prefixes[0].macs)
        return [min(prefixes, key=lambda prefix: abs(prefix.macs - wanted))]
    index = generator.randrange(len(prefixes))
    drawn = {index} if sampling == "uniform" else {0, index, len(prefixes) - 1}
    return list(dict.fromkeys(prefixes[number] for number in sorted(drawn)))  # some are equal if they are `rounded`


def random_widths(sites: Sequence[Site], generator: random.Random) -> Spec:
    """Every site keeps a number of its units, at least one and its floor, each number as likely as another."""
    return Spec({site.name: generator.choice([w for w in site.steps if w >= site.last_unit]) for site in sites})


def without_layers(spec: Spec, sites: Sequence[Site], rate: float, generator: random.Random) -> Spec:
    """Every site keeps at least one unit; one without a floor is then skipped with probability `rate` (LayerDrop)."""
    widths = {site.name: max(spec[site.name], site.steps[1]) for site in sites}
    skipped = {site.name for site in sites if generator.random() < rate and site.least == 0}
    return Spec({name: 0 if name in skipped else width for name, width in widths.items()})
