"""Latency budgets: the sub-network that an exact clock gives, and nearly the same one under a clock that is not."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import make_net

from stratavit import BudgetError, Setting
from stratavit.budgets import latency_curve
from stratavit.budgets.latency_curve import SIZES, Sample, fitted
from stratavit.evaluation import latency
from stratavit.evaluation.turns import Ratio

SHARES = (0.9, 0.7, 0.5, 0.4)


@pytest.fixture
def clock(monkeypatch):
    """A pass takes milliseconds by the thousand parameters, times what `slower` says at that moment."""
    state = SimpleNamespace(seen=[], slower=lambda: 1.0)

    def runner(model, image_size, setting):
        state.seen.append((tuple(image_size), setting))
        return sum(p.numel() for p in model.parameters()) / 1e6

    def pass_times(seconds, setting, at_least):
        return [seconds * state.slower() for _ in range(max(at_least, 5))]

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency, "pass_times", pass_times)
    monkeypatch.setattr(latency_curve, "share_waited", lambda run: [run(), 0.0][1])  # others may well be running
    return state


def test_under_an_exact_clock_the_sub_network_is_that_of_a_budget_of_parameters(clock):
    net, setting = make_net("plain", stratified=True), Setting(batch_size=7)
    for share in SHARES:
        for asked in (share * net.params() / 1000, f"{100 * share}%"):
            met = net.budget(latency_ms=asked, setting=setting)
            assert met.got <= met.asked == pytest.approx(share * net.params() / 1000)
            assert met.got == pytest.approx(net.params(met.spec) / 1000, rel=0.01)
            assert net.params(met.spec) == pytest.approx(net.params(net.spec(params=share)), rel=0.02)
            assert 0 <= met.bounds[0].spread < 0.01 * met.got
    assert {size for size, _ in clock.seen} == {(3, 32, 32)}
    assert {setting.batch_size for _, setting in clock.seen} == {7}
    assert len(clock.seen) <= 2 * len(SHARES) * (SIZES + 2)
    assert net.budget(latency_ms="60%", params=0.4).spec == net.spec(params=0.4)


def test_where_others_take_the_processors_sizes_are_compared_with_one_thread(clock, monkeypatch, capsys):
    net, setting = make_net("plain", stratified=True), Setting(threads=4)
    asked = {"latency_ms": "50%", "setting": setting}
    quiet = net.budget(**asked)
    assert {used.threads for _, used in clock.seen} == {4}
    assert "processors" not in capsys.readouterr().err
    clock.seen.clear()
    monkeypatch.setattr(latency_curve, "share_waited", lambda run: [run(), 0.4][1])
    met = net.budget(**asked)
    assert (met.spec, met.asked) == (quiet.spec, quiet.asked)
    assert [used.threads for _, used in clock.seen] == [4, *[1] * (len(clock.seen) - 1)]
    assert "processors" in capsys.readouterr().err
    clock.seen.clear()
    net.budget(latency_ms="50%", setting=Setting(threads=1))  # has nobody to wait for
    assert {used.threads for _, used in clock.seen} == {1}
    assert "processors" not in capsys.readouterr().err


def test_a_busy_machine_is_told_and_changes_little(clock, capsys):
    """Other programs take up to half of the time, in phases."""
    net, chance = make_net("plain", stratified=True), random.Random(0)
    sizes = []
    for _ in range(10):
        clock.slower = lambda: chance.choice((1.0, 1.0, 1.3, 1.6, 2.0))
        met = net.budget(latency_ms="50%", setting=Setting())
        sizes.append(net.params(met.spec) / net.params())
        assert met.got <= met.asked
    exact = net.params(net.spec(params=0.5)) / net.params()
    assert sum(sizes) / len(sizes) == pytest.approx(exact, abs=0.06)  # units of this small network are coarse
    assert max(sizes) - min(sizes) < 0.2
    assert "busy" in capsys.readouterr().err


def test_what_cannot_be_reached_is_refused_and_amounts_are_read_before_anything_is_timed(clock):
    net = make_net("plain", stratified=True)
    with pytest.raises(BudgetError, match="latency_ms"):
        net.budget(latency_ms="fast")
    assert not clock.seen
    with pytest.raises(BudgetError, match="reachable"):
        net.budget(latency_ms="1%")


def test_a_fit_falls_and_believes_timings_as_far_as_they_are_certain():
    shares = torch.linspace(1, 0, 11, dtype=torch.float64)
    features = torch.stack([shares, shares], dim=1)
    line = [Sample(index, Ratio(1 - 0.08 * index, 0.01)) for index in (2, 4, 6, 8, 10)]
    assert fitted(features, line) == pytest.approx([1 - 0.08 * index for index in range(11)])
    for spread, near in ((0.001, 0.5), (0.5, 0.68)):  # one that lies off the line
        found = fitted(features, [*line, Sample(5, Ratio(0.5, spread))])
        assert found == sorted(found, reverse=True)
        assert found[5] == pytest.approx(min(near, 0.6), abs=0.03)
