"""The share of their time that threads wait for a processor, as the system counts it."""

import pytest

from stratavit.evaluation import crowding


def test_the_share_is_that_of_the_time_of_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(crowding, "_THREADS", tmp_path)

    def count(thread, ran, waited):
        (tmp_path / thread).mkdir(exist_ok=True)
        (tmp_path / thread / "schedstat").write_text(f"{ran} {waited} 7\n")

    def run():
        count("1", 300, 10)
        count("2", 200, 110)

    count("1", 200, 10)
    count("2", 100, 10)
    assert crowding.share_waited(run) == pytest.approx(100 / 300)
    assert crowding.share_waited(lambda: None) == 0


def test_a_system_that_does_not_count_is_never_crowded(tmp_path, monkeypatch):
    monkeypatch.setattr(crowding, "_THREADS", tmp_path / "none")
    assert crowding.share_waited(lambda: None) == 0


def test_what_this_system_counts():
    assert 0 <= crowding.share_waited(lambda: sum(range(10**6))) <= 1
