"""The curve: measured where it says, largest first, the same numbers in table, CSV and picture."""

import copy
import csv
import io
import struct
from dataclasses import replace

import pytest
from helpers import PLAN, make_batches, make_net
from rich.console import Console

from stratavit import ArtifactError, StrataViTError, evaluate
from stratavit.evaluation.curve_points import LADDER, Point, by_list, parse_share, read_csv, with_before, write_csv
from stratavit.reports.curve import curve, table
from stratavit.reports.model_card import model_card
from stratavit.reports.plots import plot
from stratavit.utils.text import human

BATCHES = make_batches()


def test_points_are_what_evaluate_returns_at_the_budget(net, points):
    assert [point.asked for point in points] == ["1", "75%", "0.5"]
    for point, share in zip(points, (1.0, 0.75, 0.5), strict=True):
        met = net.budget(macs=share)
        found = evaluate(net, BATCHES, met.spec)
        assert (point.top1, point.top5, point.loss, point.n) == (found.top1, found.top5, found.loss, found.n)
        assert (point.macs, point.params) == (net.macs(met.spec), net.params(met.spec))
        assert point.share == point.macs / net.macs() <= share


@pytest.mark.parametrize("method", ["default", "paper"])
def test_the_ladder_is_in_twelfths_and_ends_at_the_smallest_size(method):
    net = make_net("plain", method, stratified=True)
    assert list(LADDER) == [f"{k}/12" for k in range(12, 1, -1)]
    low = net.budget(macs=1.0).low
    points = curve(net, BATCHES)
    assert [point.asked for point in points] == [rung for rung in LADDER if parse_share(rung) >= low / net.macs()]
    sizes = [(point.macs, point.params) for point in points]
    assert sizes[0] == (net.macs(), net.params())
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(point.macs <= parse_share(point.asked) * net.macs() for point in points)
    (last,) = curve(net, BATCHES, (f"{low}/{net.macs()}", str(low / 2 / net.macs())))
    assert last.macs == low


def test_without_a_dropout_list_it_says_what_to_do():
    with pytest.raises(StrataViTError, match="stratify"):
        curve(make_net("plain"), BATCHES, ("1",))


def test_shares_are_read():
    for text, share in (("1", 1), ("8/12", 2 / 3), (".5", 0.5), (" 50% ", 0.5), ("100%", 1)):
        assert parse_share(text) == pytest.approx(share, rel=1e-12)
    for text in ("0", "-0.5", "1.01", "150%", "13/12", "half", "", "nan", "1/x", "1/0", "1/1e-999"):
        with pytest.raises(ValueError, match=r".+"):
            parse_share(text)


def test_csv_holds_every_number(points, tmp_path):
    write_csv(points, tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {"asked": str, "macs": int, "params": int, "n": int, "axes": str, "before": lambda text: None}
    assert points == [Point(**{name: kinds.get(name, float)(text) for name, text in row.items()}) for row in rows]


def test_table_shows_every_point(points):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(points))
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    for line, point in zip(lines, points, strict=True):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert (cells[0], cells[2]) == (point.asked, f"{point.share:.1%}")
        assert cells[4:] == [f"{point.top1:.2f}", f"{point.top5:.2f}", f"{point.loss:.3f}"]


def test_picture_shows_the_numbers(points, tmp_path):
    """A PNG of the documented size; other accuracies, another picture; the same ones, the same bytes."""
    raised = [Point(**(vars(point) | {"top1": point.top1 / 2 + 40})) for point in points]
    pictures = []
    for number, shown in enumerate((points, points, raised, points[:1])):
        plot(shown, tmp_path / f"{number}.png", "a title")
        pictures.append((tmp_path / f"{number}.png").read_bytes())
        assert pictures[-1][:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", pictures[-1][16:24]) == (1050, 630)
    assert pictures[0] == pictures[1] != pictures[2]


# ---- before ---------------------------------------------------------------------------------------------


def test_an_earlier_curve_is_shown_next_to_a_later_one(points, net, tmp_path):
    earlier = [replace(point, top1=point.top1 / 2) for point in points[:-1]]
    found = with_before(points, earlier)
    assert [point.before for point in found] == [point.top1 / 2 for point in points[:-1]] + [None]
    write_csv(found, tmp_path / "curve.csv")
    assert read_csv(tmp_path / "curve.csv") == found
    assert len(table(found).columns) == len(table(points).columns) + 1
    plot(points, tmp_path / "alone.png", "a title")
    plot(found, tmp_path / "both.png", "a title")
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "both.png").read_bytes()
    assert f"| {found[0].top5:.2f} | {found[0].before:.2f} |" in model_card(net, "user/name", found)
    assert "before" not in model_card(net, "user/name", points)
    text = (tmp_path / "curve.csv").read_text().replace(f",{found[0].before}", ",101")
    (tmp_path / "curve.csv").write_text(text)
    with pytest.raises(ArtifactError, match="curve"):
        read_csv(tmp_path / "curve.csv")


# ---- two lists ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merging():
    return copy.deepcopy(make_net("plain")).stratify(BATCHES, plan=PLAN, axes=("width", "tokens"))


def test_both_lists_are_measured_where_there_are_two(merging, tmp_path):
    found = curve(merging, BATCHES, ("1", "0.6"))
    assert [(point.axes, point.asked) for point in found] == [(a, b) for a in ("width", "both") for b in ("1", "0.6")]
    for point in found:
        met = merging.budget(macs=float(point.asked), axes=point.axes)
        assert (point.top1, point.macs) == (evaluate(merging, BATCHES, met.spec).top1, merging.macs(met.spec))
    assert curve(merging, BATCHES, ("1", "0.6"), axes=("width",)) == found[:2]
    assert by_list(found[::-1]) == {"width": found[1::-1], "both": found[:1:-1]}
    assert table(found).row_count == 4
    assert len(table(found).columns) == len(table(found[:2]).columns) + 1
    write_csv(found, tmp_path / "curve.csv")
    assert read_csv(tmp_path / "curve.csv") == found
    text = (tmp_path / "curve.csv").read_text().replace(",axes", "").replace(",width", "").replace(",both", "")
    (tmp_path / "curve.csv").write_text(text)
    assert {point.axes for point in read_csv(tmp_path / "curve.csv")} == {"width"}  # of the version before
    (tmp_path / "curve.csv").write_text(text.replace(",n", ",n,axes").replace(f",{found[0].n}", f",{found[0].n},odd"))
    with pytest.raises(ArtifactError, match="curve"):
        read_csv(tmp_path / "curve.csv")


def test_the_card_names_the_list_of_a_row(merging):
    found = curve(merging, BATCHES, ("1", "0.6"))
    card = model_card(merging, "user/name", found)
    assert card.count("| width and tokens |") == card.count("| width |") == 2
    assert "cut along" not in model_card(merging, "user/name", found[:2])
    smallest = model_card(merging, "user/name")
    assert human(merging.macs(merging.spec(macs=4 / 12))) in smallest
