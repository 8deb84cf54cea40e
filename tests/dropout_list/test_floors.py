"""What a dropout list must keep: no prefix of any list goes below a floor, wherever the list comes from."""

import copy
import dataclasses
import random
from itertools import pairwise

import pytest
from helpers import FAMILIES, PLAN, make_batches, make_model, make_net
from hypothesis import given
from hypothesis import strategies as st

import stratavit
from stratavit import ArtifactError, BudgetError, StrataViTError
from stratavit.dropout_list.allocation import State, allocate, ordered_list
from stratavit.dropout_list.floors import floors_of, with_floors
from stratavit.dropout_list.strata import Strata, removal_order
from stratavit.elastic.token_places import place_of
from stratavit.models.cost import cost_model
from stratavit.models.families import find_sites
from stratavit.tasks.progressive_list import Growth, grow
from stratavit.tasks.sampling import random_widths, without_layers

COSTS = {name: cost_model(make_model(name), find_sites(make_model(name)), (3, 32, 32)) for name in FAMILIES}
PLACES = tuple(place_of(f"blocks.{index}", 16, 1) for index in range(2))
COST = dataclasses.replace(COSTS["plain"], places=PLACES)
PATTERNS = ("blocks.0.*", "*.attn", "*.mlp", "blocks.1.attn", "blocks.[01].mlp")
AMOUNT = st.integers(0, 12) | st.sampled_from([0.01, 0.25, 0.5, 0.99, 1.0])
FLOORS = st.fixed_dictionaries(
    {
        "ignore": st.none() | st.lists(st.sampled_from(PATTERNS), max_size=2),
        "min_width": st.none() | AMOUNT | st.dictionaries(st.sampled_from(PATTERNS), AMOUNT, max_size=2),
    }
)


def floored(cost, asked):
    """The cost model with floors; None if they leave nothing to cut."""
    try:
        return with_floors(cost, **asked)
    except StrataViTError:
        return None


def check_list(sites, entries):
    """Every prefix keeps the floors, prefixes nest, and what has no floor goes down to nothing."""
    strata = Strata(sites, entries)
    specs = [strata.spec(position) for position in range(len(strata) + 1)]
    assert all(small <= large for large, small in pairwise(specs))
    for site in sites:
        assert min(spec[site.name] for spec in specs) >= site.floor
        assert strata.smallest()[site.name] == min(step for step in site.steps if step >= site.floor)


@given(asked=FLOORS, data=st.data())
def test_the_default_list_keeps_floors_and_its_sizes_their_budgets(family, asked, data):
    cost = floored(COSTS[family], asked)
    if cost is None:
        return
    states, caps = [], {site.name: site.width for site in cost.sites}
    ratios = {site.name: data.draw(st.floats(-2, 2)) for site in cost.sites}
    smallest = {site.name: site.last_unit for site in cost.sites}
    for share in (5 / 6, 0.5, 0.3):
        caps = allocate(cost, ratios, share, caps)
        assert cost.macs(caps) <= share * cost.macs() or caps == smallest
        for site in cost.sites:  # no unit more would fit
            above = next((step for step in site.steps if step > caps[site.name]), None)
            if above is not None and (not states or above <= states[-1].widths[site.name]):
                assert cost.macs({**caps, site.name: above}) > share * cost.macs()
        states.append(State(share, caps))
    check_list(cost.sites, ordered_list(cost.sites, states, ratios))


@given(asked=FLOORS, data=st.data())
def test_the_papers_list_keeps_floors(family, asked, data):
    cost = floored(COSTS[family], asked)
    if cost is None:
        return
    units = {
        site.name: st.lists(st.floats(0, 10), min_size=n, max_size=n)
        for site in cost.sites
        if (n := len(site.steps) - 1)
    }
    check_list(cost.sites, removal_order(cost.sites, data.draw(st.fixed_dictionaries(units)), cost.price))


@given(asked=FLOORS, seed=st.integers(0, 99))
def test_what_training_draws_without_a_list_keeps_floors(asked, seed):
    cost = floored(COSTS["plain"], asked)
    if cost is None:
        return
    drawn = random_widths(cost.sites, random.Random(seed))
    for widths in (drawn, without_layers(drawn, cost.sites, 0.5, random.Random(seed))):
        assert all(widths[site.name] >= site.floor for site in cost.sites)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"ignore": ["blocks.0.*"]}, {"blocks.0.attn": 16, "blocks.0.mlp": 64, "blocks.0.tokens": 16}),
        ({"ignore": "*.attn"}, {"blocks.0.attn": 16, "blocks.1.attn": 16}),
        ({"ignore": ["*.tokens"]}, {"blocks.0.tokens": 16, "blocks.1.tokens": 16}),
        ({"min_width": 5}, dict.fromkeys(("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"), 5)),
        ({"min_width": {"*.mlp": 0.26, "blocks.1.*": 3}}, {"blocks.0.mlp": 17, "blocks.1.mlp": 17, "blocks.1.attn": 3}),
        ({"ignore": ["blocks.0.attn"], "min_width": {"*.attn": 2}}, {"blocks.0.attn": 16, "blocks.1.attn": 2}),
        ({"ignore": ()}, {}),
        ({"min_width": 0}, {}),
    ],
)
def test_floors_that_are_asked_for(asked, expected):
    """Whatever was asked before is replaced; None for both keeps it."""
    before = with_floors(COST, ignore=["blocks.1.mlp"])
    made = with_floors(before, **asked)
    assert floors_of((*made.sites, *made.places)) == expected
    assert with_floors(made) == made


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"ignore": ["blocks.1.atn"]}, "blocks.1.attn"),  # the nearest name
        ({"ignore": ["blocks.0"]}, "'blocks.0.*'"),
        ({"ignore": ["head"]}, "attention and MLP"),
        ({"ignore": [3]}, "3"),
        ({"ignore": ["*.attn", "*.mlp"]}, "nothing is left"),
        ({"min_width": 1.0}, "nothing is left"),
        ({"min_width": 17}, "blocks.0.attn"),  # heads of 16 coordinates
        ({"min_width": {"blocks.9.*": 4}}, "blocks.9.*"),
        ({"min_width": {"*.tokens": 4}}, "tokens"),
        ({"min_width": -1}, "-1"),
        ({"min_width": 1.5}, "1.5"),
        ({"min_width": True}, "True"),
        ({"min_width": "25%"}, "25%"),
    ],
)
def test_floors_that_cannot_be(asked, named):
    with pytest.raises(StrataViTError) as error:
        with_floors(COST, **asked)
    assert str(error.value).startswith((*asked, "ignore and min_width"))
    assert named in str(error.value)


def test_a_pattern_may_name_a_module_that_cannot_be_cut():
    cost = dataclasses.replace(COST, uncut={"blocks.7.attn": 5})
    assert with_floors(cost, ignore=["blocks.7.attn"]) == cost


# ---- with a network -------------------------------------------------------------------------------------

KEPT = {"ignore": ["blocks.0.attn", "blocks.0.tokens"], "min_width": {"*.mlp": 0.3, "blocks.1.attn": 1}}


@pytest.fixture(scope="module", params=["default", "paper"])
def net(request):
    net = copy.deepcopy(make_net("plain", request.param))
    axes = ("width", "tokens") if request.param == "default" else ("width",)
    return net.stratify(make_batches(), plan=PLAN, axes=axes, **KEPT)


def lists_of(net):
    return [one for one in (net.strata, net.joint_strata) if one is not None]


def keeps(net, strata, floors):
    """The smallest network of a list has the floors, and is not the full model."""
    smallest = strata.smallest()
    assert all(smallest[name] >= floor for name, floor in floors.items())
    return net.macs(smallest) < net.macs()


FLOOR = {"blocks.0.attn": 16, "blocks.0.mlp": 20, "blocks.1.mlp": 20, "blocks.1.attn": 1}


def test_stratify_keeps_them_on_both_lists(net):
    for strata in lists_of(net):
        assert keeps(net, strata, FLOOR)
        assert "blocks.0.tokens" not in {entry.site for entry in strata.entries}
    check_list(net.sites, net.strata.entries)


def test_the_reachable_range_ends_at_the_floors_and_a_spec_may_go_below(net):
    smallest = net.macs(net.strata.smallest())
    with pytest.raises(BudgetError):
        net.budget(macs=smallest - 1, axes="width")
    met = net.budget(macs=smallest, axes="width")
    assert (met.got, met.low) == (smallest, smallest)
    assert net.macs(net.resolve({"blocks.0.attn": 0})) < net.macs()
    net.extract(spec={"blocks.0.attn": 8})


def test_saved_and_loaded_and_kept_by_the_next_list_in_other_units(net, tmp_path):
    net.save(tmp_path / "run")
    loaded = stratavit.SuperNet.load(tmp_path / "run")
    assert loaded.sites == net.sites
    assert loaded.cost.places == net.cost.places
    loaded.set_units(4, 7)
    loaded.stratify(make_batches(), plan=PLAN)
    assert keeps(loaded, loaded.strata, FLOOR)
    loaded.stratify(make_batches(), plan=PLAN, ignore=())
    assert not any(loaded.strata.smallest().values())


def test_a_folder_whose_list_goes_below_its_floors_is_refused(net):
    with pytest.raises(ArtifactError):
        Strata(net.sites, removal_order(make_net("plain").sites, {"blocks.0.attn": [1.0, 1.0]}, net.cost.price))


def test_a_list_that_grows_in_training_keeps_them(net):
    entries = []
    for stage in range(3):
        grown = grow(net, make_batches(), entries, stage, Growth(reduction=0.99, stages=2))
        assert grown[: len(entries)] == entries
        entries = grown
    check_list(net.sites, entries)


def test_a_refused_call_changes_nothing():
    net = make_net("plain", stratified=True)
    sites, entries = net.sites, net.strata.entries
    for wrong in ({"ignore": ["nothing"]}, {"ignore": ["*.tokens"], "axes": ("width", "tokens")}):
        with pytest.raises(StrataViTError):
            net.stratify(make_batches(), plan=PLAN, **wrong)
    assert (net.sites, net.strata.entries) == (sites, entries)


def test_one_site_alone_may_be_cut():
    """Then no size at which widths are measured is in reach."""
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, min_width={"*.attn": 1.0, "*0.mlp": 1.0})
    assert {entry.site for entry in net.strata.entries} == {"blocks.1.mlp"}
    assert net.budget(macs=net.macs() - 1).got < net.macs()
