"""The dropout list that grows while the network trains: least important units first, measured where the list ends.

Source: method section 2 (arXiv 2511.11683, progressive list). What is listed never moves: later epochs only append.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stratavit.calibration.objectives import Measure, Objective
from stratavit.dropout_list import strata
from stratavit.dropout_list.sensitivity import measure_importance
from stratavit.dropout_list.strata import Entry, Strata
from stratavit.models.cost import CostModel

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


@dataclass(frozen=True)
class Growth:
    """How the list grows.

    Attributes:
        reduction: r, share of the dense MACs that the finished list drops (paper: 0.875).
        stages: P_e, times that it grows until it is finished (paper: 50, once per epoch).
        objective: What the Taylor importance differentiates, see `statistics.collect`.
        measure: What a bypass costs, see `sensitivity.bypass_sensitivity` (paper: ``top1``).
    """

    reduction: float = 0.875
    stages: int = 50
    objective: Objective = "auto"
    measure: Measure = "auto"

    def target(self, dense: int, stage: int) -> float:
        """MACs that the list must drop from stage `stage` (0 is the first) on: ``r * dense * (stage + 1) / P_e``."""
        return self.reduction * dense * min(stage + 1, self.stages) / self.stages


def extend(entries: Sequence[Entry], order: Sequence[Entry], cost: CostModel, target: float) -> list[Entry]:
    """The list with merged tails of `order`, never cut, appended until it drops `target` MACs.

    The target is missed only where nothing is left, and exceeded by less than one merged tail. `order` holds what is
    left, least important first (`strata.removal_order`).
    """
    grown = list(entries)
    widths = {entry.site: entry.width for entry in entries}
    for _, tail in groupby(order, key=lambda entry: entry.group):
        if cost.macs() - cost.macs(widths) >= target:
            break
        units = list(tail)
        grown += units
        widths |= {entry.site: entry.width for entry in units}
    return grown


def grow(net: SuperNet, loader: Iterable[Any], entries: Sequence[Entry], stage: int, growth: Growth) -> list[Entry]:
    """The list for a stage: importance is measured at the smallest sub-network so far, then units are appended.

    Args:
        net: The super-network as it is being trained.
        loader: The proxy images; run through twice.
        entries: The list of the stage before; stays in front.
        stage: 0 is the first; from `Growth.stages` on the list stays as it is.
        growth: How the list grows.

    Raises:
        StrataViTError: Bad images or labels, or a non-finite result.
    """
    widths = Strata(net.sites, entries).spec(len(entries))
    left = [site for site in net.sites if widths[site.name] > site.least]
    target = growth.target(net.macs(), stage)
    reached = net.macs() - net.macs(widths) >= target
    if stage >= growth.stages or reached or not left:
        return list(entries)
    with net.at(widths):
        importance = measure_importance(net.model, left, loader, growth.objective, growth.measure)[0]
    first_group = 1 + max((entry.group for entry in entries), default=-1)
    order = strata.removal_order(net.sites, importance, net.cost.price, first_group)
    return extend(entries, order, net.cost, target)
