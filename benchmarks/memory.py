"""Peak memory of each stage, as a ratio within one run; how that of contract grows; what a ViT-L needs.

    python benchmarks/memory.py [--shapes DeiT-Ti DeiT-S DeiT-B] [--contract]

Weights and images random, 224 pixels. Every figure is the largest resident set of a process of its own above what
it holds before there is a model: interpreter, libraries and images. The model itself counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import Batches, apart, as_if_contracted, even, noise, peak, plain, write_results
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stratavit import SuperNet
from stratavit.calibration.statistics import collect
from stratavit.dropout_list.allocation import ordered_list
from stratavit.dropout_list.strata import Strata
from stratavit.dropout_list.walk import Walk
from stratavit.reports.curve import curve
from stratavit.spec import Spec

SHAPES = {
    "DeiT-Ti": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
}
SIZES = {"DeiT-Ti": (12, 192), "DeiT-S": (12, 384), "DeiT-B": (12, 768), "ViT-L": (24, 1024)}  # depth, width
BATCH, BATCHES, SHARE = 8, 2, 0.5
CONTRACT = "contract, default"
LOADING = ("load, means only", "load", "extract", "curve")
PASSES = (
    "plain forward",
    "plain forward + backward",
    "calibration pass, paper",
    CONTRACT,
    "stratify, default",
    *LOADING,
)
STEPS = ("dense step", "elastic step, full size", "elastic step, half")
BASE = {"width": 192, "depth": 2, "batch": BATCH, "images": BATCH * BATCHES}
GROWTH = {"images": (16, 64, 256), "batch": (4, 8, 16, 32), "width": (192, 384, 768), "depth": (2, 6, 12)}
NOTE = (
    "Largest resident set of a process forked before there was any model, less what it held at first; "
    f"{BATCHES} batches of {BATCH} (one is too few: sums are added to at the second)."
)
Row = dict[str, Any]
Point = tuple[dict[str, int], float]  # sizes, MiB


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument(
        "--journal", type=Path, help="file that peaks are kept in; an interrupted run goes on from it"
    )
    arguments.add_argument("--contract", action="store_true", help="only contract and the plain pass, without growth")
    args = arguments.parse_args()
    measure = partial(kept_peak, args.journal)
    if args.contract:
        write_results("memory-contract", contract_rows(args.shapes, measure), NOTE)
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for shape in args.shapes:
            rows += shape_rows(shape, Path(work) / shape, measure)
    points: list[Point] = []
    for what, values in GROWTH.items():
        sizes = [{**BASE, what: value} for value in values]
        mib = [measure(str(size), peak_of_contract, *size.values()) for size in sizes]
        points += zip(sizes, mib, strict=True)
        rows += growth_rows(what, values, mib)
    rows += predictions(points, {row["shape"]: row["MiB"] for row in rows if row["what"] == CONTRACT})
    note = (
        f"{NOTE} Stratify: one state of "
        f"{BATCH} images; the default's 150 images of a step are 86 MiB more. Load, extract, curve: of a saved "
        "super-network, moments and all; curve: three sizes. Steps: forward, backward and AdamW, two in a row; half: "
        f"{SHARE:.0%} of the MACs, same ratio everywhere. Growth: width 192, depth 2 and one quantity varied; the "
        "ratio is to the first value. Fit: constant + a x depth x width x batch + b x depth x width squared, to the "
        "growth rows alone; ratio: predicted over measured."
    )
    write_results("memory", rows, note)


def row(shape: str, what: str, value: float | str, ratio: float | str, to: str) -> Row:
    return {"shape": shape, "what": what, "MiB": value, "ratio": ratio, "to": to}


def kept_peak(journal: Path | None, title: str, run: Callable[..., int], *arguments: Any) -> float:
    """MiB that a function finds in a process of its own, or what the journal knows under that title."""
    lines = journal.read_text().splitlines() if journal and journal.exists() else []
    known = dict(map(json.loads, lines))
    if title not in known:
        known[title] = apart(run, *arguments) / 1024
        if journal:
            with journal.open("a") as file:
                file.write(json.dumps([title, known[title]]) + "\n")
    print(title, known[title], "MiB", flush=True)
    return known[title]


def contract_rows(shapes: Sequence[str], measure: Callable[..., float]) -> list[Row]:
    """Contract over the plain pass."""
    rows, base = [], "plain forward + backward"
    for shape in shapes:
        found = {stage: measure(f"{shape} {stage}", peak_of, shape, stage, Path()) for stage in (base, CONTRACT)}
        rows += [row(shape, stage, mib, mib / found[base], base) for stage, mib in found.items()]
    return rows


def shape_rows(shape: str, work: Path, measure: Callable[..., float]) -> list[Row]:
    """All stages of one shape; `work` is where a super-network is kept for those that load one."""
    rows = []
    for stages, base in ((PASSES, "plain forward + backward"), (STEPS, "dense step")):
        found = {stage: measure(f"{shape} {stage}", peak_of, shape, stage, work) for stage in stages}
        rows += [row(shape, stage, mib, mib / found[base], base) for stage, mib in found.items()]
    return rows


def save_anew(shape: str, work: Path) -> None:
    as_if_contracted(timm.create_model(SHAPES[shape])).save(work)


def peak_of(shape: str, stage: str, work: Path) -> int:
    """Peak of a stage above the idle process, KiB."""
    if stage in LOADING and not work.exists():
        apart(save_anew, shape, work)
    batches = noise(BATCH * BATCHES, BATCH)
    idle = idle_peak()
    run = prepared(stage, SHAPES[shape], batches, work)
    forget_peak()
    run()
    return peak() - idle


def idle_peak() -> int:
    """What the process holds without a model, KiB: with what comes with the first use of torch, by a tiny one."""
    make = partial(VisionTransformer, img_size=32, embed_dim=64, depth=1, num_heads=1)
    batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))] * 2
    SuperNet(make()).contract(batches).stratify(batches, plan=Walk(((1 / 2, 1),), images=1))
    prepared_step("elastic step, half", make(), batches[0])()
    forget_peak()
    return peak()


def forget_peak() -> None:
    """The largest resident set counts from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def prepared(stage: str, name: str, batches: Batches, work: Path) -> Callable[[], object]:
    """A stage, ready to run; what it needs is there and counts, what that took to make does not."""
    if stage in STEPS:
        return prepared_step(stage, timm.create_model(name), batches[0])
    if stage == "load":
        return lambda: SuperNet.load(work)
    if stage == "load, means only":
        return lambda: SuperNet.load(work, moments=False)
    if stage in ("extract", "curve"):
        net = SuperNet.load(work)
        if stage == "extract":
            return lambda: net.extract(spec=even(net, SHARE))
        net.strata = Strata(net.sites, ordered_list(net.sites, [], dict.fromkeys(net.elastic, 0.0)))
        return lambda: curve(net, batches, ("1", "8/12", "4/12"))
    model = timm.create_model(name).eval()
    if stage == "plain forward":
        return lambda: forward(model, batches)
    if stage == "plain forward + backward":
        return lambda: plain(model, batches)
    if stage == "stratify, default":
        net = as_if_contracted(model, crossed=True)
        return lambda: net.stratify(batches, plan=Walk(((1 / 2, 1),), images=BATCH))
    net = SuperNet(model)
    return lambda: net.contract(batches) if stage == CONTRACT else collect(net.model, batches)


@torch.inference_mode()
def forward(model: nn.Module, batches: Batches) -> None:
    for images, _ in batches:
        model(images)


def prepared_step(stage: str, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    """Two training steps: the optimiser has its averages in the second."""
    if stage == "dense step":
        return partial(steps, model.train(), model, batch)
    net = as_if_contracted(model).train()
    net.compensation = "mean"  # as PIAD trains
    for module in net.elastic.values():
        module.moments = None
    spec = even(net, SHARE) if stage == "elastic step, half" else Spec(net.resolve(None))
    return partial(steps, net, lambda images: net(images, spec), batch)


def steps(model: nn.Module, answer: Callable[[torch.Tensor], Any], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    optimiser = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        F.cross_entropy(answer(batch[0]), batch[1]).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def peak_of_contract(width: int, depth: int, batch: int, images: int) -> int:
    """Peak of contract on a ViT of any size, KiB."""
    batches = noise(max(images, BATCHES * batch), batch)
    idle = idle_peak()
    net = SuperNet(VisionTransformer(embed_dim=width, depth=depth, num_heads=width // 64).eval())
    forget_peak()
    net.contract(batches)
    return peak() - idle


def growth_rows(what: str, values: Sequence[int], mib: Sequence[float]) -> list[Row]:
    """The peaks, and the exponent of the power law that fits best."""
    shape = "small ViT"
    rows = [
        row(shape, f"contract, {what} {v}", m, m / mib[0], str(values[0])) for v, m in zip(values, mib, strict=True)
    ]
    exponent, slope = np.polyfit(np.log(values), np.log(mib), 1)[0], np.polyfit(values, mib, 1)[0]
    rows.append(row(shape, f"contract, {what}: growth exponent", "", float(exponent), ""))
    rows.append(row(shape, f"contract, {what}: MiB for each one more", float(slope), "", ""))
    return rows


def terms(depth: int, width: int, batch: int) -> list[float]:
    return [1.0, depth * width * batch, depth * width * width]


def predictions(points: Sequence[Point], known: dict[str, float]) -> list[Row]:
    """The fit, against the shapes that were measured, and what it says of a larger one."""
    matrix = np.array([terms(sizes["depth"], sizes["width"], sizes["batch"]) for sizes, _ in points])
    mib = np.array([value for _, value in points])
    fit = np.linalg.lstsq(matrix / mib[:, None], np.ones(len(mib)), rcond=None)[0]  # relative errors count
    worst = float(np.abs(matrix @ fit / mib - 1).max())
    rows = [row("fit", "largest relative error over the growth rows", "", worst, "")]
    for term, value in zip(
        ("constant", "per block, token channel and image", "per block and channel squared"), fit, strict=True
    ):
        rows.append(row("fit", f"MiB, {term}", float(value), "", ""))
    for shape, (depth, width) in SIZES.items():
        value = float(np.array(terms(depth, width, BATCH)) @ fit)
        ratio = value / known[shape] if shape in known else ""
        rows.append(row(shape, "contract, predicted by the fit", value, ratio, "measured" if shape in known else ""))
    return rows


if __name__ == "__main__":
    main()
