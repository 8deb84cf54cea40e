"""Progress off a terminal: lines, rarer and rarer, of one overall job or of single loops."""

from contextlib import suppress

import pytest

from stratavit.utils import progress
from stratavit.utils.progress import begin_part, overall, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def tick(seconds=1.0):
        now[0] += seconds

    return tick


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_short_loop_says_nothing(clock, capsys):
    assert list(track(range(1000), "loop")) == list(range(1000))
    assert lines(capsys) == []


def test_a_long_loop_says_how_far_it_is_before_it_ends(clock, capsys):
    for _ in track(range(100), "loop"):
        clock()
        if _ == 10:
            assert lines(capsys) == ["loop: 5%, about 95 s left"]
    assert lines(capsys) == ["loop: 15%, about 85 s left", "loop: 35%, about 65 s left", "loop: 75%, about 25 s left"]


def test_an_endless_loop_says_what_is_done(clock, capsys):
    for _ in track(iter(range(6)), "loop"):
        clock()
    assert lines(capsys) == ["loop: 5 done in 5 s"]


def test_one_estimate_for_all_parts(clock, capsys):
    """The first loop of a part moves it by what the part is worth; what is inside or after shows nothing."""
    with overall("job", 4) as begin:
        for share in (3, 1):
            begin(share)
            for _ in track(range(4), "part"):
                clock(share)
                list(track(range(9), "inner"))
            with overall("inner job", 1) as inner:
                inner(1)
                list(track(range(9), "inner"))
    assert lines(capsys) == ["job: 38%, about 10 s left", "job: 100%, about 0 s left"]
    list(track(range(2), "afterwards"))


def test_a_part_may_know_better_what_is_left(clock, capsys):
    """And begins where the work is done, far from where the job is shown."""
    begin_part(1)  # of no job
    with overall("job", 100):
        begin_part(5, left=5)
        for _ in track(range(10), "part"):
            clock()
        assert lines(capsys) == ["job: 25%, about 15 s left"]
        begin_part(5, left=0)
        for _ in track(range(10), "part"):
            clock()
    assert lines(capsys) == ["job: 75%, about 5 s left"]


def test_an_error_ends_a_job(clock, capsys):
    with suppress(KeyError), overall("job", 1):
        raise KeyError
    for _ in track(range(10), "loop"):
        clock()
    assert lines(capsys) == ["loop: 50%, about 5 s left"]


def test_other_processes_are_silent(clock, capsys):
    with overall("job", 1, silent=True) as begin:
        begin(1)
        for _ in track(range(10), "loop"):
            clock()
    assert lines(capsys) == []
