"""The curve: measured where it says, largest first, the same numbers in table, CSV and picture."""

import csv
import io
import struct

import pytest
from helpers import make_batches, make_net
from rich.console import Console

from stratavit import StrataViTError, evaluate
from stratavit.evaluation.curve_points import LADDER, Point, parse_share, write_csv
from stratavit.reports.curve import curve, table
from stratavit.reports.plots import plot

BATCHES = make_batches()


@pytest.fixture(scope="module")
def net():
    return make_net("plain", stratified=True)


@pytest.fixture(scope="module")
def points(net):
    return curve(net, BATCHES, ("1", "75%", "0.5"))


def test_points_are_what_evaluate_says_at_the_budget(net, points):
    assert [point.asked for point in points] == ["1", "75%", "0.5"]
    for point, share in zip(points, (1.0, 0.75, 0.5), strict=True):
        met = net.budget(macs=share)
        found = evaluate(net, BATCHES, met.spec)
        assert (point.top1, point.top5, point.loss, point.n) == (found.top1, found.top5, found.loss, found.n)
        assert (point.macs, point.params) == (net.macs(met.spec), net.params(met.spec))
        assert point.share == point.macs / net.macs() <= share


def test_sizes_fall_along_the_ladder(points):
    assert points[0].share == 1
    for attribute in ("macs", "params"):
        sizes = [getattr(point, attribute) for point in points]
        assert sizes == sorted(set(sizes), reverse=True)


def test_default_ladder_is_in_twelfths_and_unreachable_rungs_are_left_out(net):
    assert list(LADDER) == [f"{k}/12" for k in range(12, 1, -1)]
    low = net.budget(macs=1.0).low / net.macs()
    reachable = [rung for rung in LADDER if parse_share(rung) >= low]
    assert [point.asked for point in curve(net, BATCHES)] == reachable
    assert curve(net, BATCHES, (str(low / 2),)) == []


def test_the_lowest_reachable_share_is_on_the_curve(net):
    low = net.budget(macs=1.0).low
    (point,) = curve(net, BATCHES, (f"{low}/{net.macs()}",))
    assert point.macs == low


def test_without_a_dropout_list_it_says_what_to_do():
    with pytest.raises(StrataViTError, match="stratify"):
        curve(make_net("plain"), BATCHES, ("1",))


def test_the_paper_method_has_a_curve():
    net = make_net("plain", "paper", stratified=True)
    assert all(point.macs <= parse_share(point.asked) * net.macs() for point in curve(net, BATCHES))


@pytest.mark.parametrize(
    ("text", "share"),
    [("1", 1), ("8/12", 2 / 3), ("0.5", 0.5), (".5", 0.5), ("50%", 0.5), (" 50% ", 0.5), ("100%", 1), ("12/12", 1)],
)
def test_shares_are_read(text, share):
    assert parse_share(text) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["0", "-0.5", "1.01", "150%", "13/12", "half", "", "%", "nan", "inf", "1/x", "1/0", "1/1e-999", "0/0"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_share(text)


def test_csv_holds_every_number(points, tmp_path):
    write_csv(points, tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {"asked": str, "macs": int, "params": int, "n": int}
    read = [Point(**{name: kinds.get(name, float)(text) for name, text in row.items()}) for row in rows]
    assert read == points


def test_table_shows_every_point(points):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(points))
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert len(lines) == len(points)
    for line, point in zip(lines, points, strict=True):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[0] == point.asked
        assert cells[2] == f"{point.share:.1%}"
        assert cells[4:] == [f"{point.top1:.2f}", f"{point.top5:.2f}", f"{point.loss:.3f}"]


@pytest.mark.parametrize("count", [1, 3])
def test_picture_is_a_png_of_the_documented_size(points, tmp_path, count):
    plot(points[:count], tmp_path / "curve.png", "a title")
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1050, 630)


def test_picture_shows_the_numbers(points, tmp_path):
    """Other accuracies, another picture; the same ones, the same bytes."""
    plot(points, tmp_path / "a.png", "a title")
    plot(points, tmp_path / "b.png", "a title")
    raised = [Point(**(vars(point) | {"top1": point.top1 / 2 + 40})) for point in points]
    plot(raised, tmp_path / "c.png", "a title")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
