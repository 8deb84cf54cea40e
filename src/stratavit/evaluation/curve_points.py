"""Accuracy at one size, and a ladder of such points as a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from stratavit.errors import ArtifactError, StrataViTError, one_line
from stratavit.files.reading import read_small

LADDER = tuple(f"{twelfths}/12" for twelfths in range(12, 1, -1))
LISTS = {"width": "width", "both": "width and tokens"}  # axes of a list -> what a reader calls it


@dataclass(frozen=True)
class Point:
    """One sub-network on the curve.

    Attributes:
        asked: Share of the dense model's MACs that was asked for.
        share: Share that was got.
        macs, params: Of the sub-network.
        top1, top5: Percent.
        loss: Mean cross-entropy.
        n: Images it was measured on.
        axes: The list that it lies on: ``width``, or ``both``, which merges tokens, too.
        before: Top-1 at the same share before the network was recovered or trained; None if it is not known.
    """

    asked: str
    share: float
    macs: int
    params: int
    top1: float
    top5: float
    loss: float
    n: int
    axes: str = "width"
    before: float | None = None


def with_before(points: Iterable[Point], earlier: Iterable[Point]) -> list[Point]:
    """The points, each with the top-1 of the point of an earlier curve at the same share of the same list."""
    known = {(point.asked, point.axes): point.top1 for point in earlier}
    return [replace(point, before=known.get((point.asked, point.axes))) for point in points]


def by_list(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of every list, in their order; the width list first."""
    found: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.axes != "width"):
        found.setdefault(point.axes, []).append(point)
    return found


def parse_share(text: str) -> float:
    """A share in (0, 1] from ``"8/12"``, ``"0.5"`` or ``"50%"``.

    Raises:
        ValueError: It is none of these.
    """
    top, _, bottom = text.strip().removesuffix("%").partition("/")
    parts = float(bottom) if bottom else 1.0
    share = float(top) / parts / (100 if text.strip().endswith("%") else 1) if parts else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"a share must be above 0 and at most 1, got {text!r}")
    return share


def write_csv(points: Sequence[Point], path: Path) -> None:
    """The curve as CSV, one row per budget."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Point.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def read_csv(path: Path) -> list[Point]:
    """What `write_csv` wrote; nothing if there is no such file.

    Raises:
        ArtifactError: It is something else.
    """
    if not path.exists():
        return []
    types = get_type_hints(Point) | {"before": lambda text: float(text) if text else None}
    try:
        rows = csv.DictReader(read_small(path).decode().splitlines(keepends=True))
        if len(rows.fieldnames or ()) > len(types):
            raise ValueError("a column is unknown or there twice")
        return [_checked(Point(**{key: types[key](value) for key, value in row.items()})) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ArtifactError(f"{path} is not a curve written by StrataViT ({one_line(error)})") from error


def points_in(folder: str | Path) -> list[Point]:
    """The curve in a folder that `stratavit curve` wrote.

    Raises:
        StrataViTError: There is none.
    """
    points = read_csv(Path(folder) / "curve.csv")
    if not points:
        raise StrataViTError(f"{folder} holds no curve.csv; make one with `stratavit curve`")
    return points


def curves(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, list[Point]]]:
    """The curves in the rows of a run's log, with the epochs that had ended; one that has other values is empty."""
    found = []
    for row in rows:
        if row["kind"] == "eval":
            points: list[Point] = []
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                points = [_checked(Point(**point)) for point in row["points"]]
            found.append((row["epoch"], points))
    return found


def last_curve(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The last of the `curves`; empty if there is none."""
    found = curves(rows)
    return found[-1][1] if found else []


def _checked(point: Point) -> Point:
    """The point, if its values are those of a network that was measured."""
    parse_share(point.asked)
    percent = 0 <= point.top1 <= 100 and 0 <= point.top5 <= 100
    counts = all(0 < count < 2**63 for count in (point.macs, point.params, point.n))
    known = point.axes in LISTS and (point.before is None or 0 <= point.before <= 100)
    if not (known and percent and counts and 0 < point.share <= 1 and 0 <= point.loss < float("inf")):
        raise ValueError(f"{point.asked}: a number is out of range")
    return point
