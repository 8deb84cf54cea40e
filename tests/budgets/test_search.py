"""Bisection along the list: the largest that costs allow, the smallest that accuracies allow, or a clear refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratavit import BudgetError
from stratavit.budgets.amounts import parse_amount, parse_measure, parse_points
from stratavit.budgets.search import Limit, meet

COSTS = [4000, 3000, 2000, 1000]


def macs(amount, costs=COSTS):
    return Limit("macs", lambda n: parse_amount(amount, n, "macs"), costs.__getitem__, True, amount, closed=True)


def latency(amount, times):
    """`times`: position -> what the clock shows, one after the other."""
    clocks = {position: iter(shown) for position, shown in times.items()}

    def measure(position):
        return next(clocks[position])

    return Limit("latency_ms", lambda n: parse_measure(amount, n, "latency_ms"), measure, True, amount, exact=False)


def top1(amount, values):
    read = lambda _: parse_points(amount, "top1")  # noqa: E731
    return Limit("top1", read, values.__getitem__, False, amount, is_goal=True)


def find(*limits, n=4):
    return meet(limits, lambda position: {"a": position}, range(n))


def test_unreachable_budget_names_the_range():
    with pytest.raises(BudgetError, match=r"macs: asked 100 = 100, but the reachable range is 1K to 4K \(25\.0% to 1"):
        find(macs(100))
    with pytest.raises(BudgetError, match=r"macs: asked 1 = 1, .*; a share is written 1\.0 or 100%"):
        find(macs(1))
    with pytest.raises(BudgetError, match=r"macs: asked 5000 = 5K, but"):
        find(macs(5000))
    with pytest.raises(BudgetError, match=r"latency_ms: asked 0\.5 = 0\.5, but the reachable range is 1 to 4 \(25"):
        find(latency(0.5, {0: [4, 4], 3: [1, 1]}))
    with pytest.raises(BudgetError, match=r"top1: asked 85 = 85, but the reachable range is 10 to 80$"):
        find(top1(85, [80, 70, 30, 10]))


def test_a_busy_moment_refuses_no_latency():
    """The smallest seemed slower than asked; before anything is refused, both ends are timed once more."""
    assert find(latency("50%", {0: [2, 4], 1: [3], 2: [2, 2], 3: [9, 1]})).got == 2
    with pytest.raises(BudgetError, match=r"asked '50%' = 2, but the reachable range is 3 to 4 \(75"):
        find(latency("50%", {0: [9, 4], 3: [9, 3]}))


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


def test_budgets_that_exclude_each_other_are_told():
    sentence = r"top1: asked 75, but the largest sub-network within macs has 30; ask for less, or allow it more"
    with pytest.raises(BudgetError, match=sentence):
        find(macs(2000), top1(75, [80, 75, 30, 10]))


def test_an_accuracy_that_does_not_fall_everywhere():
    met = find(top1(50, [80, 60, 40, 70, 45, 30]), n=6)
    assert met.got >= 50
    assert met.position in (1, 3)  # the next smaller one does not hold


def test_a_lucky_timing_is_not_trusted():
    met = find(latency(2.5, {0: [4.0], 1: [3.0], 2: [2.4, 2.6], 3: [1.0, 1.1]}))
    assert (met.position, met.got) == (3, 1.1)
    met = find(latency(2.5, {0: [4.0], 1: [3.0], 2: [2.4, 2.3], 3: [1.0]}))
    assert (met.position, met.got) == (2, 2.3)
    with pytest.raises(BudgetError, match=r"latency_ms: asked 1\.0 = 1, but the reachable range is 1\.3 to 4"):
        find(latency(1.0, {0: [4.0], 1: [3.0], 2: [2.4], 3: [1.0, 1.3]}))


def test_what_a_goal_leaves_is_timed_again():
    with pytest.raises(BudgetError, match=r"latency_ms: asked 2\.5, but the smallest sub-network within top1 has 2\.6"):
        find(latency(2.5, {0: [4.0], 1: [2.4], 2: [2.6], 3: [1.0]}), top1(20, [80, 70, 60, 10]))
    met = find(latency(2.5, {0: [4.0], 1: [2.4], 2: [2.3], 3: [1.0]}), top1(20, [80, 70, 60, 10]))
    assert (met.position, [bound.got for bound in met.bounds]) == (2, [2.3, 60])


def test_a_latency_above_the_dense_one_needs_no_cut():
    assert find(latency(10, {0: [4.0, 4.1], 3: [1.0]})).position == 0
    assert find(latency("100%", {0: [4.0, 3.9], 3: [1.0]})).position == 0
