"""Latency in place of MACs: lines through timings, and lists that follow them."""

import copy
from dataclasses import replace

import pytest
from helpers import PLAN, make_batches, make_net

from stratavit import Setting, StrataViTError, SuperNet
from stratavit.budgets.prices import fit, latency_prices
from stratavit.evaluation import latency
from stratavit.models.cost import Price, site_macs


def clock(monkeypatch, milliseconds):
    """Layers take what `milliseconds` says of their number of weights and of the images that they get."""
    seen = []

    def runner(layer, size, setting):
        seen.append((type(layer).__name__, tuple(size), setting.batch_size))
        return lambda: milliseconds(layer)

    monkeypatch.setattr(latency, "runner", runner)
    monkeypatch.setattr(latency, "pass_times", lambda run, setting, at_least: [run() / 1000] * at_least)
    return seen


def test_known_lines():
    assert fit("x", [8, 16, 24], [3.0, 5.0, 7.0]) == pytest.approx(Price(1.0, 0.25))
    assert fit("x", [1, 2], [1.0, 3.0]) == pytest.approx(Price(0.0, 7 / 5))  # it would start below nothing
    assert fit("x", [8], [4.0]) == pytest.approx(Price(0.0, 0.5))
    with pytest.raises(StrataViTError, match=r"latency: x .*\(3, 2, 1 ms at widths 8, 16, 24\)"):
        fit("x", [8, 16, 24], [3.0, 2.0, 1.0])


def test_layers_alike_are_timed_once_at_quarters(monkeypatch):
    net = make_net("plain")
    seen = clock(monkeypatch, lambda layer: sum(p.numel() for p in layer.parameters()))
    prices = latency_prices(net.cost, net.elastic, Setting(batch_size=3))
    assert sorted(seen) == sorted(
        [("Attention", (17, 32), 3)] * 2 + [("Mlp", (17, 32), 3)] * 4  # 2 units, 32 units
    )
    assert prices["blocks.0.mlp"] == prices["blocks.1.mlp"] == pytest.approx(Price(32, 65))  # fc2 bias; 2 * 32 + bias
    assert prices.keys() == {site.name for site in net.sites}


def test_real_layers_are_timed():
    net = make_net("plain")
    name = "blocks.0.mlp"
    cost = replace(net.cost, sites=tuple(site for site in net.sites if site.name == name))
    found = latency_prices(cost, net.elastic, Setting(batch_size=64, seconds=0.3))[name]
    assert found.start >= 0
    assert found.each > 0


@pytest.mark.parametrize("method", ["default", "paper"])
def test_prices_in_proportion_to_macs_give_the_list_of_macs(method, monkeypatch):
    net = copy.deepcopy(make_net("plain", method))
    images = make_batches()
    macs = net.stratify(images, plan=PLAN).strata.entries
    per_channel = {"attention": 4 * 2, "mlp": 2}

    def prices(cost, elastic, setting):
        return {site.name: Price(0.0, 0.125 * per_channel[site.kind] * 17 * site.dim) for site in cost.sites}

    assert all(8 * prices(net.cost, None, None)[s.name].each == site_macs(s, 1, 17) for s in net.sites)
    monkeypatch.setattr("stratavit.budgets.prices.latency_prices", prices)
    assert net.stratify(images, plan=PLAN, price="latency").strata.entries == macs
    assert net.provenance["stratify"]["price"] == "latency"


@pytest.mark.parametrize("method", ["default", "paper"])
def test_what_is_slow_is_cut_more(method, monkeypatch, tmp_path):
    net = copy.deepcopy(make_net("plain", method))
    images = make_batches()

    def attention_kept(slow_kind):
        """Share of the attention's width, mean over budgets, where one kind of layer is ten times as slow."""

        def prices(cost, elastic, setting):
            slow = {site.name: 10.0 if site.name.endswith(slow_kind) else 1.0 for site in cost.sites}
            return {site.name: Price(0.0, slow[site.name] * cost.site_macs(site, 1)) for site in cost.sites}

        monkeypatch.setattr("stratavit.budgets.prices.latency_prices", prices)
        net.stratify(images, plan=PLAN, price="latency")
        specs = [net.spec(macs=share / 40) for share in range(16, 40)]
        kept = [spec[name] / net.elastic[name].full_width for spec in specs for name in spec if name.endswith("attn")]
        return sum(kept) / len(kept)

    assert attention_kept("attn") < attention_kept("mlp")
    net.save(tmp_path / "run")
    assert SuperNet.load(tmp_path / "run").strata.entries == net.strata.entries
    assert net.cost.prices is None  # budgets stay what they are


def test_an_unknown_price():
    with pytest.raises(StrataViTError, match=r"price: .*'energy'"):
        copy.deepcopy(make_net("plain")).stratify(make_batches(), price="energy")
