"""What each kind of budget measures of a sub-network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from stratavit.budget import Amount, parse_amount, parse_measure, parse_points
from stratavit.errors import BudgetError
from stratavit.evaluate import evaluate
from stratavit.search import Limit
from stratavit.spec import Spec
from stratavit.timing import Setting, time_model

if TYPE_CHECKING:
    from stratavit.sizes import Sized

KINDS = ("macs", "params", "memory_mb", "latency_ms", "top1", "max_drop")
MEGABYTE = 10**6


class Asked(TypedDict, total=False):
    """Budgets and what they are measured with, see `Sized.budget`."""

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


def limits_of(
    net: Sized, amounts: Mapping[str, Amount], data: Iterable[Any] | None, setting: Setting | None
) -> list[Limit]:
    """The budgets as limits along the dropout list of a super-network."""
    setting = setting or Setting()
    strata = net.strata
    assert strata is not None
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
