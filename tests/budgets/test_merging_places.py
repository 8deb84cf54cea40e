"""How many blocks merge tokens where time counts; times are given, never measured."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import PLAN, make_batches
from timm.models.vision_transformer import VisionTransformer

from stratavit import StrataViTError, SuperNet
from stratavit.budgets.merging_places import SHARE, even_merges, measured_number, nearly_fastest
from stratavit.dropout_list.joint import token_search
from stratavit.elastic.token_places import check_tokens
from stratavit.evaluation import latency
from stratavit.evaluation.latency import Setting


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=12, num_heads=2)
    return SuperNet(model.eval())


def test_all_numbers_of_places_merge_to_the_same_macs(net):
    for number in range(2, 6):
        spec = even_merges(net.cost, number)
        assert len(spec) == number
        check_tokens(net.cost.places, spec)
        assert 0.8 * SHARE < net.macs(spec) / net.macs() <= SHARE


def test_the_largest_number_that_is_nearly_fastest():
    assert nearly_fastest({1: 1.0, 2: 1.04, 3: 1.2, 5: 1.3}) == 2
    assert nearly_fastest({2: 1.0, 3: 0.99, 5: 1.01}) == 5
    assert nearly_fastest({}) == 1


@pytest.mark.parametrize(("each", "expected"), [(0.0, 5), (0.2, 1)])
def test_places_are_as_many_as_time_allows(net, monkeypatch, each, expected):
    """Every place takes some time on top of what the MACs take."""
    merging = lambda one: sum(getattr(block, "keep", None) is not None for block in one.model.blocks)  # noqa: E731
    monkeypatch.setattr(latency, "runner", lambda model, *_: SimpleNamespace(model=model))
    monkeypatch.setattr(
        latency, "in_turns", lambda runs, *_: [SimpleNamespace(median_ms=1 + each * merging(run)) for run in runs]
    )
    assert measured_number(net.model, net.cost, Setting(), (3, 32, 32)) == expected


def test_no_place_that_may_merge(net):
    """Only the one that drops patches is left."""
    cost = replace(net.cost, places=net.cost.places[-1:])
    assert cost.places[0].unread
    assert measured_number(net.model, cost, Setting(), (3, 32, 32)) == 1
    with pytest.raises(StrataViTError, match="no block may merge"):
        token_search(("width", "tokens"), "default", net.model, cost.places, 1)


def test_the_list_that_follows_latency_asks_for_it(net, monkeypatch):
    monkeypatch.setattr("stratavit.supernet.measured_number", lambda *_: 2)
    monkeypatch.setattr("stratavit.supernet.priced", lambda cost, *_: cost)  # no layer is timed
    quick = Setting(seconds=1e-3)
    made = copy.deepcopy(net).contract(make_batches())
    made.stratify(make_batches(), plan=PLAN, axes=("width", "tokens"), price="latency", setting=quick)
    assert made.provenance["stratify"]["both_axes"]["places"] == ["blocks.1.tokens", "blocks.6.tokens"]
