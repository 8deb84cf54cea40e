"""Accuracy as pictures: against size, and against epochs of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratavit.evaluation.curve_points import LISTS, Point, by_list
from stratavit.utils.text import human

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _LINE, _MUTED = "#1f2937", "#2563eb", "#9ca3af"


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """The curve as a PNG: top-1 against MACs, a line for each list, every point labelled; a dotted line for before."""
    figure, axes = _axes(title)
    lines = by_list(points)
    for name, colour, below in ((list(lines)[-1], _LINE, False), *((name, _MUTED, True) for name in list(lines)[:-1])):
        line = lines[name]
        axes.plot(
            [p.macs for p in line], [p.top1 for p in line], color=colour, marker="o", linewidth=2, label=LISTS[name]
        )
        earlier = [(p.macs, p.before) for p in line if p.before is not None]
        if earlier:
            name = f"{LISTS[name]}, before" if len(lines) > 1 else "before"
            axes.plot(*zip(*earlier, strict=True), color=colour, linewidth=1, linestyle=":", marker=".", label=name)
        for p in line[1 if below else 0 :]:
            where = {"xytext": (0, -14 if below else 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{p.top1:.1f}", (p.macs, p.top1), **where, color=_INK, fontsize=8)
    if len(lines) > 1 or any(p.before is not None for p in points):
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.axhline(points[0].top1, color=_MUTED, linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("MACs per image (linear count)")
    axes.set_ylabel(f"top-1 %, {points[0].n} images")
    axes.set_ylim(0, max(p.top1 for p in points) * 1.12 + 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: human(value))
    figure.savefig(path, format="png")


def plot_history(evaluations: Sequence[tuple[int, Sequence[Point]]], path: Path, title: str) -> None:
    """All evaluations of a training run, (epochs, ladder) in order, as a PNG: top-1 of every rung against epochs."""
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
