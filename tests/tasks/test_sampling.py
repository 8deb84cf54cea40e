"""Drawing prefixes: reproducible from step and process alone, with the promised distributions."""

from collections import Counter

import pytest
from helpers import make_net

from stratavit.spec import Spec
from stratavit.tasks.sampling import draw, prefixes_of, rounded
from stratavit.training.task import SampledNetwork
from stratavit.utils.random_streams import stream

PREFIXES = [SampledNetwork(Spec({}), macs, index) for index, macs in enumerate((100, 90, 85, 40, 20))]


def draws(sampling, count=4000):
    found = [draw(sampling, PREFIXES, stream(0, step, 0)) for step in range(count)]
    return [tuple(one.position for one in drawn) for drawn in found]


def test_a_stream_depends_on_its_numbers_only():
    """A resumed run on another machine draws the same: the first draws are pinned."""
    assert [stream(0, step, 0).randrange(480) for step in range(4)] == [256, 149, 77, 171]
    assert len({stream(seed, step, rank).random() for seed in (0, 1) for step in (1, 11) for rank in (0, 1)}) == 8


@pytest.mark.parametrize(
    ("sampling", "edges"), [("uniform", range(5, -1, -1)), ("budget", (100, 95, 87.5, 62.5, 30, 20))]
)
def test_uniform_in_positions_or_in_macs(sampling, edges):
    """A prefix is drawn as often as its share between the edges half way to its neighbours."""
    counts = Counter(draws(sampling))
    for index in range(5):
        share = (edges[index] - edges[index + 1]) / (edges[0] - edges[-1])
        assert abs(counts[(index,)] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_sandwich_has_both_ends():
    found = draws("sandwich", 200)
    assert all(drawn[0] == 0 and drawn[-1] == 4 and len(set(drawn)) == len(drawn) for drawn in found)
    assert {index for drawn in found for index in drawn} == set(range(5))
    assert draw("sandwich", PREFIXES[:1], stream(0)) == PREFIXES[:1]


def test_prefixes_of_a_list():
    net = make_net("plain", "paper", stratified=True)
    every, groups = (prefixes_of(net.strata, net.cost, whole_groups) for whole_groups in (False, True))
    assert [one.position for one in every] == list(range(len(net.strata) + 1))
    assert [one.position for one in groups] == net.strata.group_ends()
    for prefixes in (every, groups):
        macs = [one.macs for one in prefixes]
        assert macs == sorted((net.macs(one.spec) for one in prefixes), reverse=True)
        assert dict(prefixes[0].spec) == {site.name: site.width for site in net.sites}


def test_sizes_to_compile_are_few_and_stay_while_the_list_grows():
    """The full one is always among them, none moves, and each prefix is rounded to the nearest."""
    prefixes = [SampledNetwork(Spec({}), macs, index) for index, macs in enumerate(range(1000, 190, -10))]
    before = set()
    for length in range(1, len(prefixes) + 1):
        found = rounded(prefixes[:length], 5, 800.0, length == len(prefixes))
        sizes = {one.position for one in found}
        assert len(found) == length
        assert 0 in sizes
        assert before <= sizes
        before = sizes
    assert sorted(before) == [0, 20, 40, 60, 80]
    assert all(abs(one.macs - other.macs) <= 100 for one, other in zip(prefixes, found, strict=True))


@pytest.mark.parametrize(("complete", "sizes"), [(False, {0, 20}), (True, {0, 20, 30})])
def test_a_finished_list_that_ends_early_has_its_last_prefix_among_the_sizes(complete, sizes):
    prefixes = [SampledNetwork(Spec({}), 1000 - 10 * index, index) for index in range(31)]
    assert {one.position for one in rounded(prefixes, 5, 800.0, complete)} == sizes


def test_equal_sizes_run_once():
    same = [PREFIXES[0]] * 3
    assert draw("sandwich", same, stream(0)) == PREFIXES[:1]
