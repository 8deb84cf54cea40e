"""Accuracy against size: measured along a ladder of budgets, as a table, CSV and picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from stratavit.budget import human
from stratavit.errors import ArtifactError, StrataViTError, one_line
from stratavit.evaluate import Metrics, evaluate
from stratavit.features import NEIGHBOURS, knn, zero_shot
from stratavit.folders import read_small
from stratavit.structure import classes_of
from stratavit.supernet import SuperNet

LADDER = tuple(f"{twelfths}/12" for twelfths in range(12, 1, -1))
_LARGEST = 2**63
_INK, _LINE, _MUTED = "#1f2937", "#2563eb", "#9ca3af"


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
    """

    asked: str
    share: float
    macs: int
    params: int
    top1: float
    top5: float
    loss: float
    n: int


class Judge(Protocol):
    """Measures a model, or a sub-network of one: `evaluate`, or see `judge_of`."""

    def __call__(
        self, model: nn.Module, loader: Iterable[Any], spec: Mapping[str, int] | None = None, description: str = ""
    ) -> Metrics:
        """Accuracy on labelled images."""


def judge_of(
    model: nn.Module, bank: Iterable[Any] | None = None, embeddings: Tensor | None = None, k: int = NEIGHBOURS
) -> Judge:
    """How a model is measured: by text embeddings if they are given, by its head, or by the neighbours in a bank.

    Args:
        model: A timm model, or a `SuperNet`.
        bank: Labelled images to compare with; a model with a head does not need them.
        embeddings: Of the classes, see `features.zero_shot`.
        k: Neighbours that vote.
    """
    if embeddings is not None:
        return lambda model, loader, spec=None, description="zero-shot": zero_shot(
            model, embeddings, loader, spec, description=description
        )
    if classes_of(model) or bank is None:
        return evaluate
    return lambda model, loader, spec=None, description="nearest neighbours": knn(
        model, bank, loader, spec, k, description=description
    )


def curve(net: SuperNet, loader: Iterable[Any], ladder: Sequence[str] = LADDER, judge: Judge = evaluate) -> list[Point]:
    """Measures a super-network at a ladder of MACs budgets, largest first.

    Args:
        net: With a dropout list.
        loader: Labelled images; run through once per budget.
        ladder: Shares such as ``"8/12"`` or ``"0.5"``; those below the reachable range are left out.
        judge: How accuracy is measured, see `judge_of`.
    """
    lowest = 0 if net.strata is None else net.macs(net.strata.smallest())
    points: list[Point] = []
    for asked in ladder:
        if parse_share(asked) * net.macs() < lowest:
            continue
        met = net.budget(macs=parse_share(asked))
        metrics = judge(net, loader, met.spec, description=f"MACs {asked}")
        size = {"share": met.got / net.macs(), "macs": met.got, "params": net.params(met.spec)}
        points.append(Point(asked, **size, **metrics.to_dict()))  # type: ignore[arg-type]
    return points


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


def table(points: Sequence[Point]) -> Table:
    """The curve as a table for the terminal."""
    rows = Table(title="accuracy against size")
    for heading in ("MACs asked", "MACs got", "share", "params", "top-1 %", "top-5 %", "loss"):
        rows.add_column(heading, justify="right")
    for p in points:
        cells = (human(p.macs), f"{p.share:.1%}", human(p.params), f"{p.top1:.2f}", f"{p.top5:.2f}", f"{p.loss:.3f}")
        rows.add_row(p.asked, *cells)
    return rows


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
    types = get_type_hints(Point)
    try:
        lines = csv.DictReader(read_small(path).decode().splitlines(keepends=True))
        points = [Point(**{key: types[key](value) for key, value in row.items()}) for row in lines]
        if sorted(lines.fieldnames or types) != sorted(types):
            raise ValueError("a column is missing, unknown or there twice")
        return [_checked(point) for point in points]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ArtifactError(f"{path} is not a curve written by StrataViT ({one_line(error)})") from error


def curves(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, list[Point]]]:
    """The curves in the rows of a run's log, with the epochs that had ended; one that has other values is empty."""
    found = []
    for row in rows:
        if row["kind"] == "eval":
            points: list[Point] = []
            with suppress(ValueError, TypeError, KeyError):
                points = [_checked(Point(**point)) for point in row["points"]]
            found.append((row["epoch"], points))
    return found


def last_curve(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The last of the `curves`; empty if there is none."""
    found = curves(rows)
    return found[-1][1] if found else []


def _checked(point: Point) -> Point:
    """The point, if its values are those of a network that was measured."""
    for name, kind in get_type_hints(Point).items():
        if not isinstance(getattr(point, name), int | float if kind is float else kind):
            raise TypeError(f"{point.asked}: {name} is of another type")
    parse_share(point.asked)
    percent = 0 <= point.top1 <= 100 and 0 <= point.top5 <= 100
    sizes = 0 < point.share <= 1 and 0 < point.macs < _LARGEST and 0 < point.params < _LARGEST
    if not (percent and sizes and 0 <= point.loss < float("inf") and 0 < point.n < _LARGEST):
        raise ValueError(f"{point.asked}: a number is out of range")
    return point


def points_in(folder: str | Path) -> list[Point]:
    """The curve in a folder that `stratavit curve` wrote.

    Raises:
        StrataViTError: There is none.
    """
    points = read_csv(Path(folder) / "curve.csv")
    if not points:
        raise StrataViTError(f"{folder} holds no curve.csv; make one with `stratavit curve`")
    return points


def title_of(net: SuperNet) -> str:
    """What a picture of a super-network is called: its source and its method."""
    source = net.provenance.get("source")
    name = source.get("model") if isinstance(source, Mapping) else source
    return f"{name or net.description['architecture']}, {net.method} method"


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """The curve as a PNG: top-1 against MACs, every point labelled."""
    figure, axes = _axes(title)
    axes.plot([p.macs for p in points], [p.top1 for p in points], color=_LINE, marker="o", linewidth=2)
    for p in points:
        axes.annotate(
            f"{p.top1:.1f}", (p.macs, p.top1), (0, 7), textcoords="offset points", ha="center", color=_INK, fontsize=8
        )
    axes.axhline(points[0].top1, color=_MUTED, linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("MACs per image (linear count)")
    axes.set_ylabel(f"top-1 %, {points[0].n} images")
    axes.set_ylim(0, max(p.top1 for p in points) * 1.12 + 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: human(value))
    figure.savefig(path, format="png")


def plot_history(evaluations: Sequence[tuple[int, Sequence[Point]]], path: Path, title: str) -> None:
    """All evaluations of a training run as a PNG: top-1 of every rung of the ladder against epochs.

    Args:
        evaluations: (epochs that had ended, the ladder), in order.
        path: Of the picture.
        title: Of the picture.
    """
    figure, axes = _axes(title)
    rungs = [point.asked for point in evaluations[-1][1]]
    for number, rung in enumerate(rungs):
        seen = [(epoch, p.top1) for epoch, points in evaluations for p in points if p.asked == rung]
        shade = 1 - 0.75 * number / max(1, len(rungs) - 1)
        axes.plot(*zip(*seen, strict=True), color=_LINE, alpha=shade, marker="o", markersize=3, label=rung)
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"top-1 %, {evaluations[-1][1][0].n} images")
    axes.set_ylim(0, None)
    axes.legend(title="share of MACs", fontsize=7, title_fontsize=7, frameon=False, ncols=2)
    figure.savefig(path, format="png")


def _axes(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
