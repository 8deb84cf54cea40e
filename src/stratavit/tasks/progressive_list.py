"""The dropout list that grows while the network trains: least important units first, measured where the list ends.

Source: method section 2 (arXiv 2511.11683, progressive list). What is listed never moves: later epochs only append.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stratavit.dropout_list import strata
from stratavit.dropout_list.growth import Growth
from stratavit.dropout_list.sensitivity import measure_importance
from stratavit.dropout_list.strata import Entry, Strata
from stratavit.models.cost import CostModel

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


def extend(entries: Sequence[Entry], order: Sequence[Entry], cost: CostModel, target: float) -> list[Entry]:
    """Appends merged tails of `order`, each as a whole, until the list drops `target` MACs; pure.

    Args:
        entries: The list so far; returned unchanged in front.
        order: What is left, least important first (`strata.removal_order`).
        cost: Of the model.
        target: MACs to drop; missed only where nothing is left, exceeded by less than one merged tail.
    """
    grown = list(entries)
    widths = {entry.site: entry.width for entry in entries}
    for _, tail in groupby(order, key=lambda entry: entry.group):
        if cost.macs() - cost.macs(widths) >= target:
            break
        for entry in tail:
            grown.append(entry)
            widths[entry.site] = entry.width
    return grown


def importance_at(
    net: SuperNet, widths: Mapping[str, int], loader: Iterable[Any], growth: Growth
) -> dict[str, list[float]]:
    """Importance of the units that a sub-network still has, measured at that sub-network.

    Args:
        net: Measured on its own weights in eval mode.
        widths: Width of every site; sites at 0 have nothing left and are left out.
        loader: The proxy images; run through twice.
        growth: Objective and measure.

    Returns:
        Site name -> importance of each unit left (`sensitivity.unit_importance`).

    Raises:
        StrataViTError: Bad images or labels, or a non-finite result.
    """
    left = [site for site in net.sites if widths[site.name] > 0]
    with net.at(widths):
        return measure_importance(net.model, left, loader, growth.objective, growth.measure)[0]


def grow(
    net: SuperNet, loader: Iterable[Any], entries: Sequence[Entry], stage: int, growth: Growth | None = None
) -> list[Entry]:
    """The list for a stage: importance is measured anew at the smallest sub-network so far, then units are appended.

    Args:
        net: The super-network as it is being trained.
        loader: The proxy images, in the evaluation transform; run through twice.
        entries: The list of the stage before.
        stage: 0 is the first; from `Growth.stages` on the list stays as it is.
        growth: How the list grows; the paper's if None.

    Returns:
        The entries, the given ones in front.

    Raises:
        StrataViTError: Bad images or labels, or a non-finite result.
    """
    growth = growth or Growth()
    widths = Strata(net.sites, entries).spec(len(entries))
    target = growth.target(net.macs(), stage)
    reached = net.macs() - net.macs(widths) >= target
    if stage >= growth.stages or reached or not any(widths.values()):
        return list(entries)
    importance = importance_at(net, widths, loader, growth)
    first_group = 1 + max((entry.group for entry in entries), default=-1)
    order = strata.removal_order(net.sites, importance, net.cost.price, first_group)
    return extend(entries, order, net.cost, target)
