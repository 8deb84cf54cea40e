"""Budgets: got <= asked, always, and by less than one unit; every amount means what it says."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from helpers import make_batches, make_model, make_net
from hypothesis import example, given
from hypothesis import strategies as st

from stratavit import BudgetError, Setting, StrataViTError, SuperNet
from stratavit.budgets.amounts import parse_amount, parse_measure, parse_points
from stratavit.utils.text import human

DENSE = 1_074_925_056  # MACs of DeiT-Tiny
SHARES = [(index + 1) / 50 for index in range(50)]


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_default_misses_a_budget_by_less_than_the_last_unit(family, kind):
    net = make_net(family, stratified=True)
    costs = [getattr(net, kind)(net.strata.spec(position)) for position in range(len(net.strata) + 1)]
    assert costs == sorted(set(costs), reverse=True)
    for share in SHARES:
        if share * costs[0] < costs[-1]:
            with pytest.raises(BudgetError, match=f"{kind}: asked .* reachable range is .* to "):
                net.budget(**{kind: share})
            continue
        met = net.budget(**{kind: share})
        assert met.asked == pytest.approx(share * costs[0], abs=1)
        assert met.got == costs[met.position] <= met.asked
        assert met.position == 0 or met.asked - met.got < costs[met.position - 1] - costs[met.position]
        assert (met.low, met.high, met.kind) == (costs[-1], costs[0], kind)
        assert net.spec(**{kind: share}) == met.spec == net.strata.spec(met.position)


def test_paper_stops_at_group_ends_only(source, batches):
    net = SuperNet(source).stratify(batches, method="paper")  # not contracted: importance does not fall by itself
    assert len(net.strata.group_ends()) < len(net.strata) + 1  # so tails were merged
    ends = net.strata.group_ends()
    costs = [net.macs(net.strata.spec(end)) for end in ends]
    for share in SHARES:
        if share * costs[0] < costs[-1]:
            continue
        met = net.budget(macs=share)
        index = ends.index(met.position)
        assert met.got == costs[index] <= share * costs[0]
        assert index == 0 or costs[index - 1] > met.asked
    assert net.macs(net.spec(position=1)) < costs[0]  # a position is taken as given


def test_every_cost_on_the_list_can_be_asked_for(family):
    """As a count and as its share of the dense model, the smallest one included."""
    net = make_net(family, stratified=True)
    for kind in ("macs", "params"):
        cost = getattr(net, kind)
        for position in range(len(net.strata) + 1):
            count = cost(net.strata.spec(position))
            assert net.budget(**{kind: count}).position == position
            assert net.budget(**{kind: count / cost()}).position == position


def test_full_size_is_the_full_size():
    net = make_net("plain", stratified=True)
    for amount in (1.0, "100%", net.macs(), "1.0"):
        assert net.budget(macs=amount).position == 0


@given(st.decimals(0, 100, places=2).filter(lambda d: d > 0), st.integers(1, 10**10))
def test_percent_and_share_are_the_same(percent, dense):
    expected = percent / 100 * dense
    for amount in (f"{percent}%", f" {percent} % ", float(percent) / 100):
        found = parse_amount(amount, dense, "macs")
        assert found <= expected * (1 + Decimal("1e-12"))
        assert expected - found < 1 + Decimal("1e-5")


@given(st.decimals(0, 10**4, places=3), st.sampled_from(["K", "M", "G", "T", "k", "g"]))
@example(Decimal("1.005"), "K")
def test_suffixes_mean_what_decimals_say(number, suffix):
    power = {"K": 3, "M": 6, "G": 9, "T": 12}[suffix.upper()]
    assert parse_amount(f"{number}{suffix}", DENSE, "macs") == int(number * 10**power)


@given(st.integers(0, 10**15))
def test_counts_are_taken_as_they_are(count):
    assert parse_amount(count, DENSE, "macs") == count
    assert parse_amount(str(count), DENSE, "macs") == count


@pytest.mark.parametrize("amount", [0.0, -0.5, 1.01, float("nan"), float("inf"), "0%", "101%", "1.5", "0.0"])
def test_shares_outside_zero_to_one_are_refused(amount):
    with pytest.raises(BudgetError, match=r"macs: a share must be above 0 and at most 1 \(100%\)"):
        parse_amount(amount, DENSE, "macs")


@pytest.mark.parametrize("amount", ["", "half", "50 percent", "1e9", "-1G", "2.1GMACs", "%", "G", ".", "1,5G", "0x10"])
def test_texts_that_cannot_be_read_show_what_can(amount):
    with pytest.raises(BudgetError, match=r"macs: cannot read .*'50%'.*'2\.1G'"):
        parse_amount(amount, DENSE, "macs")


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_amount(text, DENSE, "macs")
    except BudgetError:
        return
    assert isinstance(found, int)


def test_measured_amounts():
    assert [parse_measure(amount, 80, "latency_ms") for amount in (12, 12.5, "12.5", " 50 % ", 100)] == [
        12,
        12.5,
        12.5,
        40,
        100,
    ]
    assert [parse_points(amount, "top1") for amount in (75, 75.5, "75%", "0.5")] == [75, 75.5, 75, 0.5]
    assert parse_points(0.5, "max_drop") == 0.5


@pytest.mark.parametrize("amount", [0, -1, float("nan"), float("inf"), "fast", "12ms", "", True, None, "0%", "101%"])
def test_measured_amounts_that_make_no_sense(amount):
    with pytest.raises(BudgetError, match="latency_ms: "):
        parse_measure(amount, 80, "latency_ms")


@pytest.mark.parametrize("amount", [-1, 100.5, float("nan"), 0.75, "high", None, True])
def test_accuracies_that_make_no_sense(amount):
    with pytest.raises(BudgetError, match=r"top1: .*percent of images"):
        parse_points(amount, "top1")


@pytest.mark.parametrize("amount", [True, None, [0.5], 1j])
def test_other_types_are_refused(amount):
    with pytest.raises(BudgetError, match="macs: expected a share, a count or a text"):
        parse_amount(amount, DENSE, "macs")


def test_human_counts():
    counts = {0: "0", 999: "999", 1000: "1K", 5_717_416: "5.717M", DENSE: "1.075G", 2 * 10**12: "2T"}
    assert {count: human(count) for count in counts} == counts


def test_what_is_asked_must_make_sense():
    net = make_net("plain", stratified=True)
    with pytest.raises(BudgetError, match="at least one budget of macs, params, memory_mb, latency_ms, top1, max_drop"):
        net.spec()
    with pytest.raises(BudgetError, match="position: goes with no other budget, got macs and position"):
        net.budget(macs=0.5, position=3)
    with pytest.raises(BudgetError, match=r"unknown budget 'flops'; expected macs, params"):
        net.budget(flops=0.5)
    with pytest.raises(BudgetError, match="either a spec or a budget"):
        net.extract(macs=0.5, spec={})
    for kind in ("top1", "max_drop"):
        with pytest.raises(BudgetError, match=f"{kind}: is measured on labelled images; give data"):
            net.budget(**{kind: 50})
        with pytest.raises(BudgetError, match="run through several times; give a list or a DataLoader"):
            net.budget(**{kind: 50}, data=iter(make_batches()))
    with pytest.raises(BudgetError, match=r"setting: expected a stratavit\.Setting, got \{"):
        net.budget(memory_mb="50%", setting={"dtype": "float16"})


def test_numbers_of_other_libraries_are_numbers():
    net = make_net("plain", stratified=True)
    for share in (np.float32(0.7), np.array(0.7), torch.tensor(0.7)):
        assert net.spec(macs=share) == net.spec(macs=float(share))
    assert net.spec(position=np.int64(3)) == net.spec(position=3)
    assert net.spec(macs=np.int64(net.macs())) == net.spec(macs=1.0)
    assert Setting(batch_size=np.int64(4)).batch_size == 4
    for kind in ("macs", "memory_mb"):
        with pytest.raises(BudgetError, match=f"{kind}: expected"):
            net.spec(**{kind: np.array([0.7, 0.8])})


def test_bounds_come_in_the_order_asked():
    net = make_net("plain", stratified=True)
    assert [bound.kind for bound in net.budget(params=0.9, macs=0.7).bounds] == ["params", "macs"]


def test_several_budgets_all_hold(family):
    net = make_net(family, stratified=True)
    for macs, params in ((0.6, 0.9), (0.9, 0.6)):
        met = net.budget(macs=macs, params=params)
        singles = net.budget(macs=macs), net.budget(params=params)
        assert met.position == max(single.position for single in singles)
        assert [bound.kind for bound in met.bounds] == ["macs", "params"]
        assert all(bound.got <= bound.asked for bound in met.bounds)
        assert [bound.got for bound in met.bounds] == [net.macs(met.spec), net.params(met.spec)]
        assert str(met).count("\n") == 1


@pytest.mark.parametrize(("dtype", "size"), [(None, 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_memory_is_that_of_the_weights_that_are_saved(dtype, size):
    net = make_net("plain", stratified=True)
    setting = Setting(dtype=dtype)
    for amount in ("50%", 0.5 * net.params() * size / 1e6, str(0.5 * net.params() * size / 1e6)):
        met = net.budget(memory_mb=amount, setting=setting)
        small = net.extract(spec=met.spec)
        weights = sum(p.numel() for p in small.parameters()) * size / 1e6
        assert met.got == pytest.approx(weights)
        assert met.got <= met.asked
        assert met.position == net.budget(params=0.5).position
    assert net.budget(memory_mb=1e6).position == 0
    with pytest.raises(BudgetError, match=r"memory_mb: asked 1e-06 = 1e-06, but the reachable range is .* to .*%"):
        net.budget(memory_mb=1e-6)


@pytest.mark.parametrize("position", [-1, 10**6, 1.0, True, "1"])
def test_positions_outside_the_list_are_refused(position):
    with pytest.raises(BudgetError, match="position: expected a whole number from 0 to"):
        make_net("plain", stratified=True).budget(position=position)


def test_a_budget_needs_a_dropout_list():
    with pytest.raises(StrataViTError, match=r"no dropout list yet.*stratify"):
        SuperNet(make_model("plain")).contract(make_batches()).spec(macs=0.5)
