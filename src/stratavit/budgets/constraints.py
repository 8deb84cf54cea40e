"""What each kind of budget measures of a sub-network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Protocol, SupportsIndex, TypedDict

import torch
from torch import nn

from stratavit.budgets.amounts import Amount, Bound, Budget, parse_amount, parse_measure, parse_points
from stratavit.budgets.search import Limit, meet
from stratavit.dropout_list.strata import Strata
from stratavit.errors import BudgetError
from stratavit.evaluation.accuracy import evaluate
from stratavit.evaluation.latency import Setting, time_model
from stratavit.spec import Spec

KINDS = ("macs", "params", "memory_mb", "latency_ms", "top1", "max_drop")
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


def given(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The budgets that are not None.

    Raises:
        BudgetError: None at all, an unknown one, `position` beside others, or an accuracy without images.
    """
    for name in asked:
        if name not in (*KINDS, "position", "data", "setting"):
            raise BudgetError(f"unknown budget {name!r}; expected {', '.join(KINDS)} or position")
    amounts = {kind: asked[kind] for kind in asked if kind in (*KINDS, "position") and asked[kind] is not None}
    if not amounts:
        raise BudgetError(f"give at least one budget of {', '.join(KINDS)}, or a position")
    if "position" in amounts and len(amounts) > 1:
        raise BudgetError(f"position: goes with no other budget, got {' and '.join(amounts)}")
    if ("top1" in amounts or "max_drop" in amounts) and asked.get("data") is None:
        raise BudgetError(f"{'top1' if 'top1' in amounts else 'max_drop'}: is measured on labelled images; give data")
    if isinstance(asked.get("data"), Iterator):
        raise BudgetError("data: is run through several times; give a list or a DataLoader, not an iterator")
    if not isinstance(asked.get("setting") or Setting(), Setting):
        raise BudgetError(f"setting: expected a stratavit.Setting, got {asked['setting']!r}")
    return amounts


class SizedNetwork(Protocol):
    """What budgets ask of a network of many sizes; `SuperNet` is one."""

    data_config: dict[str, Any]

    def macs(self, spec: Mapping[str, int] | None = None) -> int:
        """MACs per image at a spec; the dense model's without one."""

    def params(self, spec: Mapping[str, int] | None = None) -> int:
        """Parameters at a spec; the dense model's without one."""

    def small_at(self, widths: Mapping[str, int]) -> nn.Module:
        """The small model of a spec."""


def find_sub_network(net: SizedNetwork, strata: Strata, positions: Sequence[int], asked: BudgetArgs) -> Budget:
    """The sub-network of a dropout list that keeps all budgets, see `SuperNet.budget`.

    Args:
        net: Whose sizes they are.
        strata: Its dropout list.
        positions: Those of the list that may be taken, ascending.
        asked: Budgets.

    Raises:
        BudgetError: No budget, an unreadable one, one outside the reachable range, or budgets that exclude each other.
    """
    amounts = given(asked)
    if "position" in amounts:
        return _at(net, strata, amounts["position"])
    return meet(limits_of(net, strata, amounts, asked.get("data"), asked.get("setting")), strata.spec, positions)


def _at(net: SizedNetwork, strata: Strata, position: Any) -> Budget:
    whole = isinstance(position, SupportsIndex) and not isinstance(position, bool)
    if not whole or not 0 <= (position := index(position)) <= len(strata):
        raise BudgetError(f"position: expected a whole number from 0 to {len(strata)}, got {position!r}")
    spec = strata.spec(position)
    macs = net.macs(spec)
    return Budget((Bound("macs", macs, macs, net.macs(strata.smallest()), net.macs()),), position, spec)


def limits_of(
    net: Any, strata: Strata, amounts: Mapping[str, Amount], data: Iterable[Any] | None, setting: Setting | None
) -> list[Limit]:
    """The budgets as limits along the dropout list of a super-network."""
    setting = setting or Setting()
    top1s: dict[int, float] = {}

    def at(cost: Callable[[Spec], float]) -> Callable[[int], float]:
        return lambda position: cost(strata.spec(position))

    def top1(position: int) -> float:
        if position not in top1s:
            assert data is not None
            spec = strata.spec(position)
            title = f"top-1 at {net.macs(spec) / net.macs():.0%} of the MACs"
            top1s[position] = evaluate(net, data, spec, title).top1
        return top1s[position]

    def latency(spec: Spec) -> float:
        return time_model(net.small_at(spec), net.data_config["input_size"], setting).median_ms

    def memory(spec: Spec) -> float:
        return net.params(spec) * torch.empty(0, dtype=setting.dtype_of(net)).element_size() / MEGABYTE

    def limit(kind: str, written: Amount) -> Limit:
        if kind in ("macs", "params"):
            cost = net.macs if kind == "macs" else net.params
            return Limit(kind, lambda n: parse_amount(written, int(n), kind), at(cost), True, written, closed=True)
        if kind in ("memory_mb", "latency_ms"):
            measure, exact = (memory, True) if kind == "memory_mb" else (latency, False)
            return Limit(kind, lambda n: parse_measure(written, n, kind), at(measure), True, written, exact)
        if kind == "top1":
            return Limit(kind, lambda _: parse_points(written, kind), top1, False, written, is_goal=True)
        return Limit(
            kind, lambda _: parse_points(written, kind), lambda p: top1(0) - top1(p), True, written, is_goal=True
        )

    return [limit(kind, amount) for kind, amount in amounts.items()]
