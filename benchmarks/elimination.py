"""The order of elimination in blocks against one channel at a time: seconds, and what it does to small networks.

    python benchmarks/elimination.py [--images 1000] [--shapes DeiT-Ti DeiT-S DeiT-B] [--precisions float32 float64]

Accuracy: DeiT-Tiny with real weights, sorted with each choice from one pass over the calibration images; top-1 on the
validation images at budgets of the list of the kept conversion (`common.converted`), the same widths in every row.
Energy lost: the share of the variance of an MLP's output that no linear map of half of its channels predicts, mean over
the blocks, on the calibration images. Seconds: one MLP of the shape, numbers made up, with the inverse of its
covariance. Precision: of order and inverse; covariances are those of the pass, in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import WORK, Batches, converted, interleaved, real_batches, real_model, write_results
from torch import Tensor, nn

import stratavit
from stratavit.calibration import contraction
from stratavit.calibration.elimination import BLOCK, CANDIDATES, elimination_order
from stratavit.calibration.site_observer import SiteObserver
from stratavit.calibration.statistics import observe

CHOICES = ((1, 1), (16, 2), (32, 2), (64, 1), (64, 2), (64, 4), (128, 1), (128, 2))  # block, candidates in blocks
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
SHAPES = {"DeiT-Ti": (192, 768), "DeiT-S": (384, 1536), "DeiT-B": (768, 3072)}  # outputs, hidden channels
TWELFTHS = (8, 6, 4)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=1000, help="calibration images; 0: seconds alone")
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder of kept conversions")
    arguments.add_argument("--choices", nargs="+", help="block/candidates, such as 64/2")
    arguments.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"])
    args = arguments.parse_args()
    asked = [tuple(map(int, words.split("/"))) for words in args.choices or ()]
    rows: list[dict[str, Any]] = [
        {"block": b, "candidates": c, "precision": p} for p in args.precisions for b, c in asked or CHOICES
    ]
    for shape in args.shapes:
        runs = {str(number): timed_order(*SHAPES[shape], row) for number, row in enumerate(rows)}
        for row, seconds in zip(rows, interleaved(runs, args.repeat).values(), strict=True):
            row[f"{shape}, s"] = round(seconds, 3)
            print(row, flush=True)
    if args.images:
        model = real_model("deit_tiny")
        kept, validation = converted("deit_tiny", args.work), real_batches(model, "val")
        calibration = real_batches(model, "train", args.images)
        source = stratavit.SuperNet(model).model
        observers, _ = observe(source, calibration, "auto", "weighted", "contract", contraction.TOKEN_WEIGHT)
        for row in rows:
            row |= small_networks(model, dict(observers), kept, row, validation)
            print(row, flush=True)
    note = (
        f"Seconds: medians of {args.repeat} interleaved runs, one site. Default: {BLOCK}/{CANDIDATES}; 1/1 is exact. "
        f"{args.images} images for calibration, 433 for top-1; the standard error of a difference of two rows is below "
        "that of one (about 2 points), as the images are the same."
    )
    write_results("elimination", rows, note)


def timed_order(outputs: int, hidden: int, row: dict[str, Any]) -> Any:
    """The order of one site, ready to run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * hidden, hidden, generator=generator) * torch.logspace(0, -2, hidden)
    weight = torch.randn(1, outputs, hidden, generator=generator).to(PRECISIONS[row["precision"]])
    return partial(elimination_order, weight, [x.T @ x / len(x)], row["block"], row["candidates"])


def small_networks(
    model: nn.Module,
    observers: dict[str, SiteObserver],
    kept: stratavit.SuperNet,
    row: dict[str, Any],
    validation: Batches,
) -> dict[str, Any]:
    """Top-1 and lost energy after sorting with a choice of block, candidates and precision."""
    net, own = stratavit.SuperNet(model), contraction.elimination_order

    def chosen(weight: Tensor, covariance: Iterable[Tensor]) -> Tensor:
        return own(weight.to(PRECISIONS[row["precision"]]), covariance, row["block"], row["candidates"])

    try:
        contraction.elimination_order = chosen  # type: ignore[assignment]
        contraction.sort_sites(net.model, observers, "output")
    finally:
        contraction.elimination_order = own
    net.final_mean = kept.final_mean
    found = {"energy lost, %": round(100 * lost_energy(net), 3)}
    for twelfths in TWELFTHS:
        spec = kept.spec(macs=twelfths / 12, axes="width")
        found[f"{twelfths}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1)
    return found


def lost_energy(net: stratavit.SuperNet) -> float:
    """Share of an MLP's output variance that half of its channels do not predict; mean over the blocks."""
    mlps = [module for module in net.elastic.values() if not module.attention]
    return fmean(unpredicted(module.out.weight.detach(), module.moments) for module in mlps)


def unpredicted(weight: Tensor, moments: Any) -> float:
    energies = (weight.double() @ moments.factor.double()).square().sum(dim=0)  # of W L, by column
    return float(energies[len(energies) // 2 :].sum() / energies.sum())


if __name__ == "__main__":
    main()
