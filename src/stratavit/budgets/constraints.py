"""What each kind of budget measures of a sub-network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from operator import index
from typing import Any, SupportsIndex, TypedDict, get_args

import torch

from stratavit.budgets.amounts import GOALS, KINDS, Amount, Bound, Budget, check_amount
from stratavit.budgets.latency_curve import LatencyCurve
from stratavit.budgets.search import Limit, meet
from stratavit.choices import Axes as Axes
from stratavit.dropout_list.strata import Strata
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluation.accuracy import evaluate
from stratavit.evaluation.latency import Setting
from stratavit.spec import Spec

MEGABYTE = 10**6


class BudgetArgs(TypedDict, total=False):
    """Budgets and what they are measured with, see `SuperNet.budget`."""

    macs: Amount | None
    params: Amount | None
    memory_mb: Amount | None
    latency_ms: Amount | None
    top1: Amount | None
    max_drop: Amount | None
    position: int | None
    data: Iterable[Any] | None
    setting: Setting | None
    axes: Axes | None


def find_sub_network(net: Any, asked: BudgetArgs) -> Budget:
    """The sub-network on a dropout list of a `SuperNet` that keeps all budgets, see `SuperNet.budget`.

    Raises:
        BudgetError: No budget, an unreadable one, one outside the reachable range, or budgets that exclude each other.
    """
    if net.strata is None:
        raise StrataViTError("no dropout list yet: call stratify(loader) first, or give a spec")
    amounts = _given(asked)
    strata = _list_for(net, amounts, asked.get("axes") or "auto")
    positions = range(len(strata) + 1) if net.method == "default" else strata.group_ends()
    if "position" in amounts:
        return _at(net, strata, amounts["position"])
    setting = asked.get("setting") or Setting()
    measures, ends = _measures(net, strata, asked.get("data"), setting), (positions[0], positions[-1])
    measures["latency_ms"] = curve = LatencyCurve(net, strata, positions, setting)
    timing, dense = {"latency_ms": curve}, net.macs()

    def size(position: int) -> float:
        return float(net.macs(strata.spec(position)) / dense)

    limits = [Limit(kind, amount, measures[kind], ends, timing.get(kind), size) for kind, amount in amounts.items()]
    return meet(limits, strata.spec, positions)


def find_spec(net: Any, spec: Mapping[str, int] | None, verbose: bool, asked: BudgetArgs) -> Spec:
    """The width of every site of a `SuperNet`, by a spec or by budgets; `verbose` prints what was got for these.

    Raises:
        BudgetError: Both are given; or see `find_sub_network`.
    """
    if spec is None:
        met: Budget = net.budget(**asked)
        if verbose:
            print(met, file=sys.stderr)
        spec = met.spec
    elif any(value is not None for name, value in asked.items() if name != "setting"):
        raise BudgetError("give either a spec or a budget, not both")
    found: Spec = net.resolve(spec)
    return found


def check_budgets(asked: Mapping[str, Any]) -> None:
    """Checks budgets as far as that is possible without a network, so that a mistake is found before long work.

    Raises:
        BudgetError: No budget, an unreadable one, or budgets that exclude each other.
    """
    for kind, amount in _given(asked).items():
        if kind != "position":
            check_amount(kind, amount)


def _list_for(net: Any, amounts: Mapping[str, Any], axes: str) -> Strata:
    """The width list, or that over both axes."""
    if axes not in get_args(Axes):
        raise BudgetError(f"axes: expected {', '.join(get_args(Axes))}, got {axes!r}")
    if axes == "both" and net.joint_strata is None:
        raise BudgetError(
            "axes: there is no list over both axes; make one by `stratavit convert --axes both`, or in Python by "
            "`stratify` with ('width', 'tokens')"
        )
    widths_alone = axes == "width" or (axes == "auto" and amounts.keys() & {"params", "memory_mb", "position"})
    found: Strata = net.strata if widths_alone or net.joint_strata is None else net.joint_strata
    return found


def _given(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The budgets that are not None."""
    for name in asked:
        if name not in (*KINDS, "position", "data", "setting", "axes"):
            raise BudgetError(f"unknown budget {name!r}; expected {', '.join(KINDS)} or position")
    amounts = {
        kind: amount for kind, amount in asked.items() if kind not in ("data", "setting", "axes") and amount is not None
    }
    if not amounts:
        raise BudgetError(f"give at least one budget of {', '.join(KINDS)}, or a position")
    if "position" in amounts and len(amounts) > 1:
        raise BudgetError(f"position: goes with no other budget, got {' and '.join(amounts)}")
    for kind in GOALS:
        if kind in amounts and asked.get("data") is None:
            raise BudgetError(f"{kind}: is measured on labelled images; give data")
    if isinstance(asked.get("data"), Iterator):
        raise BudgetError("data: is run through several times; give a list or a DataLoader, not an iterator")
    if not isinstance(asked.get("setting"), Setting | None):
        raise BudgetError(f"setting: expected a stratavit.Setting, got {asked['setting']!r}")
    return amounts


def _at(net: Any, strata: Strata, position: Any) -> Budget:
    whole = isinstance(position, SupportsIndex) and not isinstance(position, bool)
    if not whole or not 0 <= (position := index(position)) <= len(strata):
        raise BudgetError(f"position: expected a whole number from 0 to {len(strata)}, got {position!r}")
    spec = strata.spec(position)
    macs = net.macs(spec)
    return Budget((Bound("macs", macs, macs, net.macs(strata.smallest()), net.macs()),), position, spec)


def _measures(
    net: Any, strata: Strata, data: Iterable[Any] | None, setting: Setting
) -> dict[str, Callable[[int], float]]:
    """Kind of budget -> what it measures at a position of the dropout list; all but latency."""

    def at(cost: Callable[[Spec], float]) -> Callable[[int], float]:
        return lambda position: cost(strata.spec(position))

    def memory(spec: Spec) -> float:
        return net.params(spec) * torch.empty(0, dtype=setting.dtype_of(net)).element_size() / MEGABYTE

    @cache
    def top1(position: int) -> float:
        assert data is not None
        spec = strata.spec(position)
        return evaluate(net, data, spec, f"top-1 at {net.macs(spec) / net.macs():.0%} of the MACs").top1

    return {
        "macs": at(net.macs),
        "params": at(net.params),
        "memory_mb": at(memory),
        "top1": top1,
        "max_drop": lambda position: top1(0) - top1(position),
    }
