"""Draws the pictures of the documentation that no benchmark draws.

    python docs/tools/pictures.py

Two are computed here, from the demo's small ViT trained on scikit-learn's digits (a minute); the others show tables in
benchmarks/results. The demo's curve and the table of one_shot.py have their own commands.
"""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stratavit
from stratavit.tasks import demo

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
BLUE, LIGHT, GREY = "#2563eb", "#bfd3fb", "#9ca3af"
SHARES = (1, 10 / 12, 8 / 12, 6 / 12, 4 / 12)
COLUMNS = ("12/12", "10/12", "8/12", "6/12", "4/12")


def main() -> None:
    """Draws all of them."""
    matplotlib.rcParams.update(
        {"svg.hashsalt": "stratavit", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    )
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.edgecolor": "#6b7280"})
    latency()
    training()
    source, net = digits_net()
    module(source, net)
    dropout_list(net)


def digits_net() -> tuple[nn.Module, stratavit.SuperNet]:
    """The demo's small ViT after its training, and the super-network made of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, _ = demo.digits()
    model = demo.small_vit()
    demo.train(model, data, 30, torch.device("cpu"))
    calibration = DataLoader(data, batch_size=256)
    return model, stratavit.SuperNet(model, demo.DATA_CONFIG).contract(calibration).stratify(calibration)


def energies(model: nn.Module, site: str, images: Tensor) -> Tensor:
    """What each channel adds to the output of a module on average: variance times squared weight."""
    layer: Any = model.get_submodule(site)
    layer = layer.proj if hasattr(layer, "proj") else layer.fc2
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0].var(dim=0) * layer.weight.detach().square().sum(dim=0)


def module(source: nn.Module, net: stratavit.SuperNet) -> None:
    """One head and one MLP before and after contraction, and where a cut at half of the width falls."""
    images = demo.digits()[0].tensors[0][:512]
    sorted_ = copy.deepcopy(source)
    sorted_.load_state_dict(net.model.state_dict(), strict=True)
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots(2, 2)
    head = net.sites[2].width
    for line, (site, keep, name) in enumerate(
        [
            ("blocks.1.attn", slice(0, head), "values of one head"),
            ("blocks.1.mlp", slice(None), "hidden channels of an MLP"),
        ]
    ):
        for axis, model, when in ((axes[line, 0], source, "as trained"), (axes[line, 1], sorted_, "contracted")):
            heights = energies(model, site, images)[keep]
            heights = heights / heights.sum()
            cut = len(heights) // 2 if model is sorted_ else len(heights)
            axis.stairs(heights[:cut], range(cut + 1), color=BLUE, fill=True)
            axis.stairs(heights[cut:], range(cut, len(heights) + 1), color=LIGHT, fill=True)
            axis.set_title(f"{name}, {when}", fontsize=9, loc="left")
            axis.set_ylabel("share of the output" if model is source else "")
            if model is sorted_:
                axis.axvline(cut, color="black", linewidth=1, linestyle="--")
                kept = float(heights[:cut].sum())
                axis.text(
                    cut + 0.5,
                    axis.get_ylim()[1] * 0.8,
                    f"cut at half: the prefix\nholds {kept:.0%}",
                    va="top",
                    bbox={"color": "white", "alpha": 0.8, "pad": 1},
                )
        for axis in axes[line]:
            axis.set_ylim(0, max(axis.get_ylim()[1] for axis in axes[line]))
    for axis in axes[1]:
        axis.set_xlabel("channel")
    write(figure, "stratified-module.svg")


def dropout_list(net: stratavit.SuperNet) -> None:
    """Kept width of every module along the dropout list."""
    assert net.strata is not None
    shares, rows = [], []
    for position in range(len(net.strata) + 1):
        spec = net.spec(position=position)
        shares.append(net.macs(spec) / net.macs())
        rows.append([spec[site.name] / site.width for site in net.sites])
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axis = figure.subplots()
    mesh = axis.pcolormesh(
        [*shares, shares[-1] - 1e-3],
        range(len(net.sites) + 1),
        list(zip(*rows, strict=True)),
        cmap="Blues",
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    axis.set_yticks([number + 0.5 for number in range(len(net.sites))], [site.name for site in net.sites])
    axis.set_ylim(len(net.sites), 0)
    axis.set_xlim(1, shares[-1])
    axis.set_xlabel("share of the dense model's MACs that is left; the list is walked from left to right")
    at = next(position for position, share in enumerate(shares) if share <= 0.5)
    axis.axvline(shares[at], color="black", linewidth=1, linestyle="--")
    axis.set_title(
        f"macs=0.5 is position {at} of {len(net.strata)}: one width for every module", fontsize=9, loc="left"
    )
    figure.colorbar(mesh, ax=axis, label="share of its width that a module keeps")
    write(figure, "dropout-list.svg")


def latency() -> None:
    """Share of the dense latency that was got against share of the MACs that it took."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="latency falls as MACs do")
    for batch, colour in ((1, BLUE), (16, "#f97316")):
        rows = read(f"2026-11-25-latency-budgets-batch{batch}")
        dense = float(rows[0]["asked ms"]) / 0.9  # the first target is 0.9 of it
        points = [(float(row["MACs share"]), float(row["got ms"]) / dense) for row in rows]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=f"batch {batch}")
    axis.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="share of the dense MACs", ylabel="share of the dense latency")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    write(figure, "latency-budgets.svg")


def training() -> None:
    """CIFAR-10: networks of a list against their size, by how they were trained."""
    paper, full = read("2026-11-24-cifar10"), read("2026-11-25-cifar10-compensated")
    arms = [
        (paper, "plain", "plain training", GREY, "--"),
        (paper, "weighted", "weighted channel dropout", "#a78bfa", "--"),
        (paper, "piad", "PIAD, as in the paper", "#f97316", "-"),
        (full, "one-shot", "not trained, one-shot", "black", ":"),
        (full, "piad-given", "PIAD, compensated, given list", "#16a34a", "-"),
        (full, "piad-sandwich", "the same, sandwich", BLUE, "--"),
    ]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for rows, arm, label, colour, style in arms:
        row = next(row for row in rows if row["arm"] == arm)
        axis.plot(
            SHARES, [float(row[c].split()[0]) for c in COLUMNS], style, marker="o", ms=3, color=colour, label=label
        )
    axis.set(xlabel="share of the dense model's MACs", ylabel="top-1, %", ylim=(55, 92))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    write(figure, "cifar10.svg")


def read(name: str) -> list[dict[str, str]]:
    """Rows of a result table."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(figure: Figure, name: str) -> None:
    """Writes a picture; the same figures give the same bytes."""
    FigureCanvasSVG(figure)
    figure.savefig(DOCS / "images" / name, metadata={"Date": None}, dpi=200)


if __name__ == "__main__":
    main()
