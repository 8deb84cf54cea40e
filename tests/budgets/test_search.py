"""Bisection along the list: the largest that costs allow, the smallest that accuracies allow, or a clear refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratavit import BudgetError
from stratavit.budgets.search import Limit, meet

COSTS = [4000, 3000, 2000, 1000]


def macs(amount, costs=COSTS):
    return "macs", amount, costs.__getitem__


def latency(amount, times):
    """`times`: position -> what the clock shows, one after the other."""
    clocks = {position: iter(shown) for position, shown in times.items()}
    return "latency_ms", amount, lambda position: next(clocks[position])


def top1(amount, values):
    return "top1", amount, values.__getitem__


def find(*limits, n=4):
    return meet([Limit(*limit, ends=(0, n - 1)) for limit in limits], lambda position: {"a": position}, range(n))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (macs(100), r"macs: asked 100 = 100, .* 1K to 4K \(25\.0% to 1"),
        (macs(1), r"macs: asked 1 = 1, .*; a share is written 1\.0 or 100%"),
        (macs(5000), r"macs: asked 5000 = 5K, "),
        (latency(0.5, {0: [4, 4], 3: [1, 1]}), r"latency_ms: asked 0\.5 = 0\.5, .* 1 to 4 \(25"),
        (latency("50%", {0: [9, 4], 3: [9, 3]}), r"asked '50%' = 2, .* 3 to 4 \(75"),  # both ends timed again
        (top1(85, [80, 70, 30, 10]), r"top1: asked 85 = 85, .* 10 to 80$"),
    ],
)
def test_an_unreachable_budget_names_the_range(limit, message):
    with pytest.raises(BudgetError, match=message):
        find(limit)


def test_a_busy_moment_refuses_no_latency():
    """The smallest seemed slower than asked; before anything is refused, both ends are timed once more."""
    assert find(latency("50%", {0: [2, 4], 1: [3], 2: [2, 2], 3: [9, 1]})).got == 2


def test_what_is_printed():
    assert str(find(macs(2500))) == "macs: asked 2.5K, got 2K (50.0% of the dense model); reachable 1K to 4K"
    assert str(find(top1(35, [80, 70, 30, 10]))) == "top1: asked 35, got 70; reachable 10 to 80"


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60, unique=True), st.data())
def test_the_largest_within_costs_and_the_smallest_with_accuracies(costs, data):
    costs.sort(reverse=True)
    n = len(costs)
    accuracies = sorted(data.draw(st.lists(st.floats(0, 100), min_size=n, max_size=n)), reverse=True)
    asked = data.draw(st.integers(costs[-1], costs[0]))
    first = next(position for position in range(n) if costs[position] <= asked)
    assert find(macs(asked, costs), n=n).position == first
    times = {position: [float(cost)] * 2 for position, cost in enumerate(costs)}
    assert find(latency(asked, times), n=n).position == first
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


@pytest.mark.parametrize(
    ("second", "last", "found"), [([2.4, 2.6], [1.0, 1.1], (3, 1.1)), ([2.4, 2.3], [1.0], (2, 2.3))]
)
def test_a_lucky_timing_is_not_trusted(second, last, found):
    met = find(latency(2.5, {0: [4.0], 1: [3.0], 2: second, 3: last}))
    assert (met.position, met.got) == found


def test_a_lucky_timing_of_the_smallest():
    with pytest.raises(BudgetError, match=r"latency_ms: asked 1\.0 = 1, .* 1\.3 to 4"):
        find(latency(1.0, {0: [4.0], 1: [3.0], 2: [2.4], 3: [1.0, 1.3]}))


def test_what_a_goal_leaves_is_timed_again():
    with pytest.raises(BudgetError, match=r"latency_ms: asked 2\.5, .* smallest .* top1 has 2\.6"):
        find(latency(2.5, {0: [4.0], 1: [2.4], 2: [2.6], 3: [1.0]}), top1(20, [80, 70, 60, 10]))
    met = find(latency(2.5, {0: [4.0], 1: [2.4], 2: [2.3], 3: [1.0]}), top1(20, [80, 70, 60, 10]))
    assert (met.position, [bound.got for bound in met.bounds]) == (2, [2.3, 60])


@pytest.mark.parametrize(("amount", "dense"), [(10, [4.0, 4.1]), ("100%", [4.0, 3.9])])
def test_a_latency_above_the_dense_one_needs_no_cut(amount, dense):
    assert find(latency(amount, {0: dense, 3: [1.0]})).position == 0
