"""Bisection along the list: the largest that costs allow, the smallest that accuracies allow, or a clear refusal."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratavit import BudgetError
from stratavit.budgets.search import Limit, meet

COSTS = [4000, 3000, 2000, 1000]


def macs(amount, costs=COSTS):
    return "macs", amount, costs.__getitem__


def latency(amount, times):
    """`times`: of each position; timed for as long as it takes to know them."""
    timing = SimpleNamespace(
        aim=lambda asked: asked(times[0]), spread=lambda position: times[position] / 100, dense=[[1.0] * 3]
    )
    return "latency_ms", amount, times.__getitem__, timing


def top1(amount, values):
    return "top1", amount, values.__getitem__


def find(*limits, n=4):
    made = [Limit(kind, amount, measure, (0, n - 1), *timing) for kind, amount, measure, *timing in limits]
    return meet(made, lambda position: {"a": position}, range(n))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (macs(100), r"macs: asked 100 = 100, .* 1K to 4K \(25\.0% to 1"),
        (macs(1), r"macs: asked 1 = 1, .*; a share is written 1\.0 or 100%"),
        (macs(5000), r"macs: asked 5000 = 5K, "),
        (macs(50), r"macs: asked 50 = 50, .*did you mean 50%\?"),
        (latency(0.5, [4, 3, 2, 1]), r"latency_ms: asked 0\.5 = 0\.5, .* 1 to 4 \(25.*did you mean 50%\?"),
        (latency("50%", [4, 3.5, 3.2, 3]), r"asked '50%' = 2, .* 3 to 4 \(75"),
        (top1(85, [80, 70, 30, 10]), r"top1: asked 85 = 85, .* 10 to 80$"),
    ],
)
def test_an_unreachable_budget_names_the_range(limit, message):
    with pytest.raises(BudgetError, match=message):
        find(limit)


def test_what_is_printed():
    assert str(find(macs(2500))) == "macs: asked 2.5K, got 2K (50.0% of the dense model); reachable 1K to 4K"
    assert str(find(latency(2.5, [4, 3, 2, 1]))).startswith("latency_ms: asked 2.5, got 2 ± 0.02 (50")
    assert str(find(top1(35, [80, 70, 30, 10]))) == "top1: asked 35, got 70; reachable 10 to 80"


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60, unique=True), st.data())
def test_the_largest_within_costs_and_the_smallest_with_accuracies(costs, data):
    costs.sort(reverse=True)
    n = len(costs)
    accuracies = sorted(data.draw(st.lists(st.floats(0, 100), min_size=n, max_size=n)), reverse=True)
    asked = data.draw(st.integers(costs[-1], costs[0]))
    first = next(position for position in range(n) if costs[position] <= asked)
    assert find(macs(asked, costs), n=n).position == first
    assert find(latency(asked, costs), n=n).position == first
    wanted = data.draw(st.floats(1, 100))
    holding = [position for position in range(first, n) if accuracies[position] >= wanted]
    if not holding:
        with pytest.raises(BudgetError, match="top1: asked"):
            find(macs(asked, costs), top1(wanted, accuracies), n=n)
    else:
        met = find(macs(asked, costs), top1(wanted, accuracies), n=n)
        assert met.position == holding[-1]
        assert [bound.got for bound in met.bounds] == [costs[met.position], accuracies[met.position]]


def test_budgets_that_exclude_each_other_are_named():
    with pytest.raises(BudgetError, match=r"top1: asked 75, .* largest .* macs has 30"):
        find(macs(2000), top1(75, [80, 75, 30, 10]))


def test_an_accuracy_that_does_not_fall_everywhere():
    met = find(top1(50, [80, 60, 40, 70, 45, 30]), n=6)
    assert met.got >= 50
    assert met.position in (1, 3)  # the next smaller one does not hold


def test_a_latency_and_a_goal_both_hold():
    met = find(latency(2.5, [4.0, 2.4, 2.3, 1.0]), top1(20, [80, 70, 60, 10]))
    assert (met.position, [bound.got for bound in met.bounds]) == (2, [2.3, 60])


@pytest.mark.parametrize("amount", [10, "100%"])
def test_a_latency_above_the_dense_one_needs_no_cut(amount):
    assert find(latency(amount, [4.0, 3.0, 2.0, 1.0])).position == 0
