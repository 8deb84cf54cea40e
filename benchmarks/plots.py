"""Draws the newest results of each benchmark from their CSV files, beside them, and shows them in their pages.

    python benchmarks/plots.py [NAME ...]

Nothing is measured. `one_shot.py`, `quality.py` and `cifar10.py` can draw their curves themselves, too (`--picture`).
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, draw_lines
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = list[dict[str, str]]
SHARES = ("10/12", "8/12", "6/12", "4/12")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", choices=[*PLOTS, []], help="of benchmarks (default: all)")
    for name in arguments.parse_args().names or PLOTS:
        found = sorted(path for path in RESULTS.glob("*.csv") if re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{name}", path.stem))
        if not found:
            print(f"{name}: no results yet")
            continue
        path = found[-1]
        with path.open(encoding="utf-8", newline="") as file:
            PLOTS[name](list(csv.DictReader(file)), path.with_suffix(".png"))
        page, image = path.with_suffix(".md"), f"![{name}]({path.stem}.png)"
        if image not in (text := page.read_text(encoding="utf-8")):
            page.write_text(f"{text.rstrip()}\n\n{image}\n", encoding="utf-8")
        print(path.with_suffix(".png").name)


def bars(
    series: str,
    labels_of: tuple[str, ...],
    value: str,
    xlabel: str,
    log: bool = False,
    one: bool = False,
    only: str = "",
) -> Callable[..., None]:
    """A drawing with a group of bars for each of `labels_of`, a colour for each of `series` that begins with `only`."""

    def draw(rows: Rows, path: Path) -> None:
        rows = [row for row in rows if row[value] and row.get(series, "").startswith(only)]
        labels = list(dict.fromkeys(label(row, labels_of) for row in rows))
        kinds = list(dict.fromkeys(row.get(series, "") for row in rows))
        axes, save = canvas(path, 0.35 * len(labels) * max(1.0, 0.6 * len(kinds)) + 1.6)
        for number, kind in enumerate(kinds):
            own = [row for row in rows if row.get(series, "") == kind]
            places = [labels.index(label(row, labels_of)) + 0.8 * (number + 0.5) / len(kinds) - 0.4 for row in own]
            held = axes.barh(places, [float(row[value]) for row in own], 0.8 / len(kinds), label=kind, log=log)
            axes.bar_label(held, fmt=lambda v: f"{v:.2g}" if v < 10 else f"{v:.0f}", fontsize=7, padding=2)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        if one:
            axes.axvline(1, color="#9ca3af", linestyle=":")
        if any(kinds):
            axes.legend(fontsize=7, frameon=False)
        save()

    return draw


def against(series: tuple[str, ...], x: str, y: str, xlabel: str, ylabel: str) -> Callable[..., None]:
    """A drawing of `y` against `x`, where they would be equal if all went as promised."""

    def draw(rows: Rows, path: Path) -> None:
        axes, save = canvas(path, 4.5)
        for kind in dict.fromkeys(label(row, series) for row in rows):
            points = sorted((float(row[x]), float(row[y])) for row in rows if label(row, series) == kind)
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=kind)
        ends = [pick(float(row[x]) for row in rows) for pick in (min, max)]
        axes.plot(ends, ends, ":", color="#9ca3af", label="as promised")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(fontsize=7, frameon=False)
        save()

    return draw


def sizes(first: str, best: str, title: str) -> Callable[..., None]:
    """A drawing of top-1 against the share of the MACs, a line for each row."""

    def draw(rows: Rows, path: Path) -> None:
        lines: dict[str, Sequence[tuple[float, float]]] = {}
        for row in rows:
            shares = [share for share in ("12/12", *SHARES) if row.get(share, "-") not in ("", "-")]
            lines[row[first]] = [(float(row.get(f"kept {s}") or number(s)), float(row[s])) for s in shares]
        draw_lines(lines, path, title, best=best)

    return draw


def gains(rows: Rows, path: Path) -> None:
    """Points gained against images and against steps, with the deviation between seeds."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    usual = rows[0]["images of"]
    own = [row for row in rows if row["images of"] == usual]
    most = max(own, key=lambda row: int(row["images"]))["images"]
    sides = {"images": [row for row in own if row["steps"] == own[0]["steps"]]}
    sides["steps"] = [row for row in own if row["images"] == most]
    for axes, (column, points) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        points = sorted(points, key=lambda row, column=column: int(row[column]))  # type: ignore[misc]
        spread = [float(row["sd"] or 0) for row in points]
        axes.errorbar([int(row[column]) for row in points], [float(row["gain"]) for row in points], spread, fmt="o-")
        for row in rows if column == "images" else []:
            if row["images of"] != usual:
                axes.errorbar(
                    int(row["images"]), float(row["gain"]), float(row["sd"] or 0), fmt="s", label=row["images of"]
                )
                axes.legend(fontsize=7, frameon=False)
        axes.axhline(0, color="#9ca3af", linestyle=":")
        axes.set(xlabel=f"{column} (log)", xscale="log")
        axes.set_xticks([int(row[column]) for row in points], [row[column] for row in points])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("points of top-1 gained")
    figure.savefig(path, dpi=120)


def number(share: str) -> float:
    """The number that a share like ``10/12`` stands for."""
    above, below = share.split("/")
    return int(above) / int(below)


def label(row: dict[str, str], columns: tuple[str, ...]) -> str:
    """What a row is called, without the number of images it was measured on, which differs by shape."""
    first, *more = columns
    name = re.sub(r", \d+ images", "", row[first])
    return ", ".join([name, *(f"{column} {row[column]}" for column in more)])


def canvas(path: Path, height: float) -> tuple[Axes, Callable[[], Any]]:
    """Axes to draw on, and what writes them."""
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    return axes, lambda: figure.savefig(path, dpi=120)


PLOTS: dict[str, Callable[..., None]] = {
    "quality-deit_tiny": sizes("what", "StrataViT, default", "DeiT-Tiny, calibrated on 1,000 images, no training"),
    "quality-vit_tiny_augreg": sizes("what", "StrataViT, default", "ViT-Tiny (AugReg), 1,000 images, no training"),
    "dinov2-knn-112px": sizes("method", "default", "DINOv2 ViT-S/14, nearest neighbours on CIFAR-10, no training"),
    "recover-images-deit_tiny": gains,
    "speed": bars("shape", ("what",), "ratio", "ratio within one run", log=True, one=True),
    "memory": bars("shape", ("what",), "ratio", "ratio of peaks", one=True, only="DeiT"),
    "speed-growth": bars(
        "quantity", ("what",), "growth exponent", "exponent of the power law that fits best", one=True
    ),
    "scale": bars(
        "",
        ("what", "processes", "threads of each"),
        "measured / predicted",
        "measured over predicted images a second",
        one=True,
    ),
    "newcomer": bars("", ("step",), "seconds", "seconds"),
    "cost-model": bars("model", ("stage",), "hours at 20%", "hours, at 20% of the GPUs' peak", log=True),
    "latency": against(
        ("model", "runtime"), "MACs ratio", "speed-up", "MACs ratio to the dense model", "speed-up over it"
    ),
    "piad-cost": against(("what",), "linear MACs", "time", "share of linear MACs", "share of the dense step's time"),
}


if __name__ == "__main__":
    main()
