"""Budgets: got <= asked, always, and by less than one unit; every amount means what it says."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from helpers import make_batches, make_net
from hypothesis import example, given
from hypothesis import strategies as st

from stratavit import BudgetError, Setting, StrataViTError, SuperNet, evaluate
from stratavit.budgets.amounts import MOST, check_amount, parse
from stratavit.utils.text import human

DENSE = 1_074_925_056  # MACs of DeiT-Tiny
SHARES = [(index + 1) / 50 for index in range(50)]


def test_human_counts():
    counts = {0: "0", 999: "999", 1000: "1K", 5_717_416: "5.717M", DENSE: "1.075G", 2 * 10**12: "2T"}
    assert {count: human(count) for count in counts} == counts


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_default_misses_a_budget_by_less_than_the_last_unit(family, kind):
    net = make_net(family, stratified=True)
    costs = [getattr(net, kind)(net.strata.spec(position)) for position in range(len(net.strata) + 1)]
    assert costs == sorted(set(costs), reverse=True)
    for position, cost in enumerate(costs):  # every cost on the list can be asked for, as a count and as a share
        assert net.budget(**{kind: cost}).position == net.budget(**{kind: cost / costs[0]}).position == position
    for share in SHARES:
        if share * costs[0] < costs[-1]:
            with pytest.raises(BudgetError, match=f"{kind}: asked .* reachable"):
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


def test_full_size_is_the_full_size():
    net = make_net("plain", stratified=True)
    for amount in (1.0, "100%", net.macs(), "1.0"):
        assert net.budget(macs=amount).position == 0


@given(st.decimals(0, 100, places=2).filter(lambda d: d > 0), st.integers(1, 10**10))
def test_percent_and_share_are_the_same(percent, dense):
    expected = percent / 100 * dense
    for amount in (f"{percent}%", f" {percent} % ", float(percent) / 100):
        found = parse("macs", amount, dense)
        assert found <= expected * (1 + Decimal("1e-12"))
        assert expected - found < 1 + Decimal("1e-5")


@given(st.decimals(0, 10**4, places=3), st.sampled_from(["K", "M", "G", "T", "k", "g"]))
@example(Decimal("1.005"), "K")
def test_suffixes_mean_what_decimals_say(number, suffix):
    power = {"K": 3, "M": 6, "G": 9, "T": 12}[suffix.upper()]
    assert parse("macs", f"{number}{suffix}", DENSE) == int(number * 10**power)


@given(st.integers(1, 12), st.integers(12, 10**10))
def test_a_fraction_is_a_share(twelfths, dense):
    assert (
        parse("macs", f"{twelfths}/12", dense) == dense * twelfths // 12 == parse("params", f"{twelfths} / 12", dense)
    )


@given(st.integers(MOST + 1, 10**15))
def test_counts_are_taken_as_they_are(count):
    assert parse("macs", count, DENSE) == parse("macs", str(count), DENSE) == count


def test_measured_amounts():
    amounts = (12, 12.5, "12.5", " 50 % ", 100, "8ms", "8 ms", "6/12", "0.01s")
    assert [parse("latency_ms", amount, 80) for amount in amounts] == [12, 12.5, 12.5, 40, 100, 8, 8, 40, 10]
    amounts = ("12MB", "0.5 GB", "900kB", "3/4", "1MiB")
    assert [parse("memory_mb", amount, 80) for amount in amounts] == [12, 500, 0.9, 60, 2**20 / 1e6]
    assert [parse("macs", amount, DENSE) for amount in ("2.1GMACs", "600M MACs")] == [2_100_000_000, 600_000_000]
    assert [parse("top1", amount, 0) for amount in (75, 75.5, "75%", "0.5%", "1")] == [75, 75.5, 75, 0.5, 1]
    assert parse("max_drop", 0.5, 0) == 0.5


NAN, INF = float("nan"), float("inf")
TEXTS = [
    "",
    "half",
    "50 percent",
    "1e9",
    "-1G",
    "MACs",
    "%",
    "G",
    ".",
    "1,5G",
    "0x10",
    "1/0",
    "0/12",
    "13/12",
    "8/",
    "8ms",
    "8MB",
]
BAD = {
    "macs": [0.0, -0.5, 1.01, NAN, INF, "0%", "101%", "1.5", "0.0", True, None, [0.5], 1j, *TEXTS],
    "latency_ms": [0, -1, NAN, INF, "fast", "12MB", "12K", "13/12", "s", "", True, None, "0%", "101%"],
    "top1": [-1, 100.5, NAN, 0.75, "high", "1K", None, True],
}
MEANT = [  # kind, what was written, what it may have meant
    ("macs", "50", "50%"),
    ("params", "8", "8%"),
    ("macs", "1", "100%"),
    ("macs", "50.0", "50%"),
    ("top1", "0.7", "70%"),
    ("max_drop", ".02", "2%"),
    ("max_drop", "0.5", "0.5%"),
]


@pytest.mark.parametrize(("kind", "amount"), [(kind, amount) for kind, amounts in BAD.items() for amount in amounts])
def test_amounts_that_make_no_sense_are_refused(kind, amount):
    with pytest.raises(BudgetError, match=f"{kind}: .*%"):  # shows what can be written
        parse(kind, amount, 80)


@pytest.mark.parametrize(("kind", "amount", "meant"), MEANT)
def test_what_may_have_been_meant_is_asked_before_any_work(kind, amount, meant):
    with pytest.raises(BudgetError, match=rf"^{kind}: .*{amount!r}.*{meant}"):
        check_amount(kind, amount)
    assert check_amount(kind, meant) is None


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse("macs", text, DENSE)
    except BudgetError:
        return
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "macs, params, memory_mb, latency_ms, top1, max_drop"),
        ({"macs": 0.5, "position": 3}, "position: .*macs and position"),
        ({"flops": 0.5}, "'flops'"),
        ({"top1": 50}, "top1: .*data"),
        ({"max_drop": 50}, "max_drop: .*data"),
        ({"top1": 50, "data": iter([])}, "data: .*DataLoader"),
        ({"memory_mb": "50%", "setting": {"dtype": "float16"}}, r"setting: .*Setting, got \{"),
        *(({"position": position}, "position: .* from 0 to") for position in (-1, 10**6, 1.0, True, "1")),
        ({"macs": np.array([0.7, 0.8])}, "macs: expected"),
        ({"memory_mb": torch.tensor([0.7, 0.8])}, "memory_mb: expected"),
    ],
)
def test_what_is_asked_must_make_sense(asked, message):
    with pytest.raises(BudgetError, match=message):
        make_net("plain", stratified=True).budget(**asked)


def test_a_spec_or_a_budget_of_a_dropout_list():
    with pytest.raises(BudgetError, match="not both"):
        make_net("plain", stratified=True).extract(macs=0.5, spec={})
    with pytest.raises(StrataViTError, match="stratify"):
        make_net("plain").spec(macs=0.5)


def test_numbers_of_other_libraries_are_numbers():
    net = make_net("plain", stratified=True)
    for share in (np.float32(0.7), np.array(0.7), torch.tensor(0.7)):
        assert net.spec(macs=share) == net.spec(macs=float(share))
    assert net.spec(position=np.int64(3)) == net.spec(position=3)
    assert net.spec(macs=np.int64(net.macs())) == net.spec(macs=1.0)
    assert Setting(batch_size=np.int64(4)).batch_size == 4


def test_several_budgets_all_hold(family):
    net = make_net(family, stratified=True)
    for asked in ({"macs": 0.6, "params": 0.9}, {"params": 0.6, "macs": 0.9}):
        met = net.budget(**asked)
        assert met.position == max(net.budget(**{kind: amount}).position for kind, amount in asked.items())
        assert [bound.kind for bound in met.bounds] == list(asked)  # in the order asked
        assert all(bound.got <= bound.asked for bound in met.bounds)
        assert [bound.got for bound in met.bounds] == [getattr(net, kind)(met.spec) for kind in asked]
        assert str(met).count("\n") == 1


@pytest.mark.parametrize(("dtype", "size"), [(None, 4), ("bfloat16", 2)])
def test_memory_is_that_of_the_weights_that_are_saved(dtype, size):
    net = make_net("plain", stratified=True)
    setting = Setting(dtype=dtype)
    for amount in ("50%", 0.5 * net.params() * size / 1e6, str(0.5 * net.params() * size / 1e6)):
        met = net.budget(memory_mb=amount, setting=setting)
        small = net.extract(spec=met.spec)
        assert met.got == pytest.approx(sum(p.numel() for p in small.parameters()) * size / 1e6)
        assert met.got <= met.asked
        assert met.position == net.budget(params=0.5).position
    assert net.budget(memory_mb=1e6).position == 0


def test_accuracy_budgets_are_measured_on_the_data():
    net, data = make_net("plain", stratified=True), make_batches()
    dense = evaluate(net, data).top1
    curve = [evaluate(net, data, net.strata.spec(position)).top1 for position in range(len(net.strata) + 1)]
    for wanted in sorted(set(curve)):
        if wanted > dense or wanted == 0:
            continue
        met = net.budget(top1=float(wanted) if wanted >= 1 else f"{wanted}%", data=data)
        assert met.got == curve[met.position] >= wanted
        assert met.position == len(net.strata) or curve[met.position + 1] < wanted
        drop = net.budget(max_drop=dense - wanted, data=data)
        assert drop.got == pytest.approx(dense - curve[drop.position])
        assert drop.got <= dense - wanted + 1e-9
