"""Whether a run has learned: curves before and after, or losses where nothing was evaluated."""

import re

import pytest

from stratavit.evaluation.curve_points import Point
from stratavit.training.verdict import first_curve, verdict


def curve(epoch, top1, loss=1.0, n=400):
    points = [Point(f"{12 - 2 * i}/12", 1 - i / 6, 100, 100, value, 100.0, loss, n) for i, value in enumerate(top1)]
    return {"kind": "eval", "epoch": epoch, "points": [vars(point) for point in points]}


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [
        (curve(0, [33.0]), curve(9, [80.0]), None),
        (curve(0, [33.0]), curve(9, [33.5]), "nothing was learned.* chance among 400"),
        (curve(0, [33.0], 1.1), curve(9, [33.0], 0.9), None),  # the loss fell
        (curve(0, [80.0, 27.6]), curve(9, [80.5, 3.5]), "10/12"),
        (curve(0, [80.0, 27.6]), curve(9, [80.0, 60.0]), None),
        (curve(0, [90.0], n=20), curve(9, [85.0], n=20), "nothing was learned"),  # one image of 20 is chance
        (curve(0, [100.0]), curve(9, [100.0]), "nothing was learned"),
    ],
)
def test_curves(before, after, warned):
    found = verdict([before, {"kind": "epoch", "epoch": 1, "loss": 1.0}, after])
    assert bool(found) == bool(warned)
    assert not warned or re.search(warned, found[0])
    assert first_curve([before, after])[0].top1 == before["points"][0]["top1"]


def test_losses():
    rows = [{"kind": "epoch", "epoch": number, "loss": loss} for number, loss in enumerate((2.0, 2.5, 2.1))]
    assert "nothing was learned" in verdict(rows)[0]
    assert verdict([*rows, {"kind": "epoch", "epoch": 4, "loss": 1.0}]) == verdict(rows[:1]) == verdict([]) == []
    assert first_curve(rows) == []
