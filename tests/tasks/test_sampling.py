"""Drawing prefixes: reproducible from step and process alone, with the promised distributions."""

from collections import Counter

import pytest
from helpers import make_net

from stratavit import StrataViTError
from stratavit.tasks.sampling import Prefixes, draw
from stratavit.utils.random_streams import stream

MACS = (100, 90, 85, 40, 20)


def draws(sampling, count=4000):
    return [draw(sampling, MACS, stream(0, step, 0)) for step in range(count)]


def test_a_stream_depends_on_its_numbers_only():
    assert stream(0, 5, 1).random() == stream(0, 5, 1).random()
    assert len({stream(seed, step, rank).random() for seed in (0, 1) for step in (1, 11) for rank in (0, 1)}) == 8


def test_the_first_draws_are_pinned():
    """A resumed run on another machine draws the same."""
    assert [stream(0, step, 0).randrange(480) for step in range(4)] == [256, 149, 77, 171]


def test_uniform_draws_every_position_alike():
    counts = Counter(draws("uniform"))
    assert set(counts) == {(index,) for index in range(5)}
    assert all(abs(count - 800) < 5 * (4000 * 0.2 * 0.8) ** 0.5 for count in counts.values())


def test_sandwich_has_both_ends():
    found = draws("sandwich", 200)
    assert all(drawn[0] == 0 and drawn[-1] == 4 for drawn in found)
    assert {index for drawn in found for index in drawn} == set(range(5))
    assert all(len(set(drawn)) == len(drawn) for drawn in found)
    assert draw("sandwich", (100,), stream(0)) == (0,)


def test_budget_is_uniform_in_macs():
    counts = Counter(index for (index,) in draws("budget"))
    edges = (100, 95, 87.5, 62.5, 30, 20)  # half way between neighbours
    for index in range(5):
        share = (edges[index] - edges[index + 1]) / 80
        assert abs(counts[index] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_unknown_sampling():
    with pytest.raises(StrataViTError, match="sampling: expected"):
        draw("always", MACS, stream(0))


def test_prefixes_of_a_list():
    net = make_net("plain", "paper", stratified=True)
    every, whole = (Prefixes.of(net.strata, net.cost, flag) for flag in (False, True))
    assert every.positions == tuple(range(len(net.strata) + 1))
    assert list(whole.positions) == net.strata.group_ends()
    for prefixes in (every, whole):
        assert list(prefixes.macs) == sorted(prefixes.macs, reverse=True)
        assert prefixes.macs == tuple(net.macs(spec) for spec in prefixes.specs)
        assert dict(prefixes.specs[0]) == {site.name: site.width for site in net.sites}
