"""`Spec`: a mapping of widths that is checked, immutable, hashable and JSON."""

import copy
import json
import pickle

import pytest
from helpers import make_net
from hypothesis import given
from hypothesis import strategies as st

from stratavit import Spec, StrataViTError

WIDTHS = st.dictionaries(st.text(max_size=8), st.integers(0, 10**6), max_size=5)


@given(WIDTHS)
def test_json_round_trip(widths):
    spec = Spec(widths)
    assert Spec.from_json(spec.to_json()) == spec == widths
    assert json.loads(spec.to_json()) == widths


@given(WIDTHS)
def test_equal_specs_hash_alike_whatever_the_order(widths):
    backwards = Spec(dict(reversed(widths.items())))
    assert hash(backwards) == hash(Spec(widths))
    assert len({backwards, Spec(widths)}) == 1


def test_inclusion_needs_every_site_at_most_as_wide():
    assert Spec({"a": 1, "b": 2}) <= Spec({"a": 1, "b": 3})
    assert not Spec({"a": 2, "b": 2}) <= Spec({"a": 1, "b": 3})
    assert not Spec({"a": 1}) <= Spec({"a": 1, "b": 3})


def test_does_not_follow_the_dict_it_was_made_from():
    widths = {"a": 1}
    spec = Spec(widths)
    widths["a"] = 2
    assert spec["a"] == 1
    with pytest.raises(TypeError):
        spec["a"] = 3


@pytest.mark.parametrize("widths", [{"a": -1}, {"a": 1.0}, {"a": True}, {"a": "8"}, {"a": None}, {3: 8}])
def test_bad_widths_are_refused(widths):
    with pytest.raises(StrataViTError, match=r"spec: .*(whole number|strings)"):
        Spec(widths)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"a": 1.5}', '{"a": -1}', '{"a": true}'])
def test_bad_json_is_refused(text):
    with pytest.raises(StrataViTError, match="spec:"):
        Spec.from_json(text)


def test_resolve_names_every_site_and_refuses_what_does_not_fit():
    net = make_net("plain")
    full = {"blocks.0.attn": 16, "blocks.0.mlp": 64, "blocks.1.attn": 16, "blocks.1.mlp": 64}
    assert dict(net.resolve(None)) == full
    assert dict(net.resolve({"blocks.1.mlp": 0})) == full | {"blocks.1.mlp": 0}
    with pytest.raises(StrataViTError, match=r"unknown site 'blocks\.7\.mlp'.*blocks\.0\.attn"):
        net.resolve({"blocks.7.mlp": 1})
    with pytest.raises(StrataViTError, match=r"blocks\.0\.attn.*at most 16.*17"):
        net.resolve({"blocks.0.attn": 17})


SPECS = [{}, {"a": 1}, {"a": {"qk": 8, "v": 4}, "b": 3}, {"b": {"qk": 0, "v": 0}}]


CHANGES = [
    lambda spec: spec.qk.update(a=5),
    lambda spec: setattr(spec, "qk", {"a": 5}),
    lambda spec: setattr(spec, "_widths", {"a": 5}),
    lambda spec: setattr(spec, "new", 5),
    lambda spec: delattr(spec, "_widths"),
    lambda spec: spec.__setitem__("a", 5),
    lambda spec: spec.update(a=5),
]


@pytest.mark.parametrize("widths", SPECS)
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_spec_cannot_be_changed(widths, number):
    spec = Spec(widths)
    before, qk = dict(spec), dict(spec.qk)
    with pytest.raises((AttributeError, TypeError)):
        CHANGES[number](spec)
    assert (dict(spec), dict(spec.qk)) == (before, qk)


@pytest.mark.parametrize("widths", SPECS)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, *(lambda spec, p=p: pickle.loads(pickle.dumps(spec, p)) for p in range(2, 6))],
)
def test_copies_of_a_spec_are_specs(widths, copied):
    spec = Spec(widths)
    other = copied(spec)
    assert type(other) is Spec
    assert other == spec
    assert hash(other) == hash(spec)
    assert dict(other.qk) == dict(spec.qk)
    with pytest.raises(AttributeError):
        other.qk = {}
