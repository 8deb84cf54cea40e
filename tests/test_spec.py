"""`Spec`: a mapping of widths that is checked, immutable, hashable and JSON; errors are one printable sentence."""

import copy
import json
import pickle

import pytest
from helpers import make_net
from hypothesis import given
from hypothesis import strategies as st

from stratavit import Spec, StrataViTError
from stratavit.errors import described, one_line, shown

WIDTHS = st.dictionaries(st.text(max_size=8), st.integers(0, 10**6), max_size=5)


@given(WIDTHS)
def test_json_round_trip_and_hash(widths):
    spec, backwards = Spec(widths), Spec(dict(reversed(widths.items())))
    assert Spec.from_json(spec.to_json()) == spec == widths
    assert json.loads(spec.to_json()) == widths
    assert len({backwards, spec}) == 1


def test_inclusion_needs_every_site_at_most_as_wide():
    assert Spec({"a": 1, "b": 2}) <= Spec({"a": 1, "b": 3})
    assert not Spec({"a": 2, "b": 2}) <= Spec({"a": 1, "b": 3})
    assert not Spec({"a": 1}) <= Spec({"a": 1, "b": 3})


@pytest.mark.parametrize("widths", [5, {"a": -1}, {"a": 1.0}, {"a": True}, {"a": "8"}, {3: 8}])
def test_bad_widths_are_refused(widths):
    with pytest.raises(StrataViTError, match="spec: "):
        Spec(widths)


def test_resolve_names_every_site_and_refuses_what_does_not_fit():
    net = make_net("plain")
    full = {"blocks.0.attn": 16, "blocks.0.mlp": 64, "blocks.1.attn": 16, "blocks.1.mlp": 64}
    assert dict(net.resolve(None)) == full
    assert dict(net.resolve({"blocks.1.mlp": 0})) == full | {"blocks.1.mlp": 0}
    with pytest.raises(StrataViTError, match=r"unknown site 'blocks\.7\.mlp'.*blocks\.0\.attn"):
        net.resolve({"blocks.7.mlp": 1})
    with pytest.raises(StrataViTError, match=r"blocks\.0\.attn.*at most 16.*17"):
        net.resolve({"blocks.0.attn": 17})


CHANGES = [
    lambda spec: spec.qk.update(a=5),
    lambda spec: setattr(spec, "qk", {"a": 5}),
    lambda spec: setattr(spec, "_widths", {"a": 5}),
    lambda spec: setattr(spec, "new", 5),
    lambda spec: delattr(spec, "_widths"),
    lambda spec: spec.__setitem__("a", 5),
    lambda spec: spec.update(a=5),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_spec_cannot_be_changed(number):
    widths = {"a": {"qk": 8, "v": 4}, "b": 3}
    spec = Spec(widths)
    widths["b"] = 2
    with pytest.raises((AttributeError, TypeError)):
        CHANGES[number](spec)
    assert (dict(spec), dict(spec.qk)) == ({"a": 4, "b": 3}, {"a": 8})
    assert repr(spec) == "Spec({'a': 4, 'b': 3})"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_copies_of_a_spec_are_specs(copied):
    spec = Spec({"a": {"qk": 8, "v": 4}, "b": 3})
    other = copied(spec)
    assert type(other) is Spec
    assert (other, hash(other), dict(other.qk)) == (spec, hash(spec), {"a": 8})


def test_values_and_sentences_of_others_fit_into_one_line():
    assert described([10**5000]) == "a very large list"
    assert one_line(ValueError("a\x00b\ud800c\nsecond line")) == r"a\x00b\ud800c"
    assert one_line(ValueError()) == "ValueError"
    assert shown("blocks.0\n" * 99) == (r"blocks.0\n" * 99)[:200]
