"""Budgets: got <= asked, always, and by less than one unit; every amount means what it says."""

from decimal import Decimal

import pytest
from helpers import make_batches, make_model, make_net
from hypothesis import example, given
from hypothesis import strategies as st

from stratavit import BudgetError, StrataViTError, SuperNet
from stratavit.budget import human, meet, parse_amount

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


@pytest.mark.parametrize("amount", [True, None, [0.5], 1j])
def test_other_types_are_refused(amount):
    with pytest.raises(BudgetError, match="macs: expected a share, a count or a text"):
        parse_amount(amount, DENSE, "macs")


def test_unreachable_budget_names_the_range():
    sentence = r"params: asked 100 = 100, but the reachable range is 1K to 4K \(25\.0% to 100%\)"
    with pytest.raises(BudgetError, match=sentence):
        meet("params", 100, lambda spec: spec["a"], lambda position: {"a": 4000 - 1000 * position}, range(4))


def test_budget_prints_asked_got_and_range():
    met = meet("macs", 2500, lambda spec: spec["a"], lambda position: {"a": 4000 - 1000 * position}, range(4))
    assert str(met) == "macs: asked 2.5K, got 2K (50.0% of the dense model); reachable 1K to 4K"


def test_human_counts():
    counts = {0: "0", 999: "999", 1000: "1K", 5_717_416: "5.717M", DENSE: "1.075G", 2 * 10**12: "2T"}
    assert {count: human(count) for count in counts} == counts


def test_exactly_one_budget_must_be_given():
    net = make_net("plain", stratified=True)
    with pytest.raises(BudgetError, match=r"exactly one.*got none"):
        net.spec()
    with pytest.raises(BudgetError, match=r"exactly one.*got macs and params"):
        net.budget(macs=0.5, params=0.5)
    with pytest.raises(BudgetError, match="either a spec or a budget"):
        net.extract(macs=0.5, spec={})


@pytest.mark.parametrize("position", [-1, 10**6, 1.0, True, "1"])
def test_positions_outside_the_list_are_refused(position):
    with pytest.raises(BudgetError, match="position: expected a whole number from 0 to"):
        make_net("plain", stratified=True).budget(position=position)


def test_a_budget_needs_a_dropout_list():
    with pytest.raises(StrataViTError, match=r"no dropout list yet.*stratify"):
        SuperNet(make_model("plain")).contract(make_batches()).spec(macs=0.5)
