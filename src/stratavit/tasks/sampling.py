"""Which prefix of the dropout list a training step runs: drawn from its number alone, so that nothing is stored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stratavit.dropout_list.strata import Strata
from stratavit.elastic.site import Site
from stratavit.errors import StrataViTError
from stratavit.models.cost import CostModel
from stratavit.spec import Spec
from stratavit.training.recipe import Sampling
from stratavit.training.task import SampledNetwork


@dataclass(frozen=True)
class Prefixes:
    """The sub-networks that may be drawn, largest first.

    Attributes:
        positions: Entries of the list that each drops.
        specs: Their widths.
        macs: Their MACs per image.
    """

    positions: tuple[int, ...]
    specs: tuple[Spec, ...]
    macs: tuple[int, ...]

    @classmethod
    def of(cls, strata: Strata, cost: CostModel, whole_groups: bool) -> Prefixes:
        """All prefixes of a list, or only those that cut no merged tail in two (paper)."""
        positions = tuple(strata.group_ends()) if whole_groups else tuple(range(len(strata) + 1))
        specs = tuple(strata.spec(position) for position in positions)
        return cls(positions, specs, tuple(cost.macs(spec) for spec in specs))

    def __getitem__(self, index: int) -> SampledNetwork:
        return SampledNetwork(self.specs[index], self.macs[index], self.positions[index])


def random_widths(sites: Sequence[Site], generator: random.Random) -> Spec:
    """Every site keeps a number of its units, at least one, each number as likely as another."""
    return Spec({site.name: generator.choice(site.steps[1:]) for site in sites})


def without_layers(spec: Spec, sites: Sequence[Site], rate: float, generator: random.Random) -> Spec:
    """Every site keeps at least one unit, and is then skipped as a whole with probability `rate` (LayerDrop)."""
    widths = {site.name: max(spec[site.name], site.steps[1]) for site in sites}
    return Spec({name: 0 if generator.random() < rate else width for name, width in widths.items()})


def draw(sampling: Sampling, macs: Sequence[int], generator: random.Random) -> tuple[int, ...]:
    """Draws what one batch runs, as indices into `Prefixes`.

    Args:
        sampling: ``uniform`` over the positions (paper); ``sandwich``, the largest, a uniform one and the smallest, all
            on the same batch (three passes); ``budget``, uniform in MACs: the prefix nearest to a
            uniform draw between the smallest and the largest.
        macs: MACs of the prefixes, largest first.
        generator: See `random_streams.stream`.

    Raises:
        StrataViTError: Unknown sampling.
    """
    if sampling == "uniform":
        return (generator.randrange(len(macs)),)
    if sampling == "sandwich":
        return tuple(dict.fromkeys((0, generator.randrange(len(macs)), len(macs) - 1)))
    if sampling == "budget":
        wanted = generator.uniform(macs[-1], macs[0])
        return (min(range(len(macs)), key=lambda index: abs(macs[index] - wanted)),)
    raise StrataViTError(f"sampling: expected 'uniform', 'sandwich' or 'budget', got {sampling!r}")
