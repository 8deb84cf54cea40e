"""Merging tokens next to narrow layers alone, nothing trained: top-1 at a ladder of budgets.

    python benchmarks/tokens.py --model deit_tiny [--only paper width both tome fixed]

Calibrates on 1,000 training images, reports top-1 on the validation images: the paper's method, the width list, the
list over both axes made in the same run, r tokens merged in every block (`tome.py`), and fixed numbers of tokens at
full width. The networks are kept in `benchmarks/work`; a second run only evaluates.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import quality
import tome
from common import MODELS, RESULTS, WORK, Batches, converted, draw_lines, real_batches, real_model, write_results
from torch import nn

import stratavit
from stratavit.errors import BudgetError

TWELFTHS = (10, 8, 6, 4, 3)
ROWS = ("paper", "width", "both", "tome", "fixed")
TITLES = {
    "paper": "the paper, one-shot",
    "width": "width list",
    "both": "list over width and tokens",
    "tome": "r tokens merged in every block",
}
FIXED: dict[int, Mapping[int, int]] = {  # twelfths of the MACs -> block -> tokens merged away there
    10: {3: 16, 5: 24, 7: 24, 9: 16},
    8: {1: 16, 3: 32, 5: 32, 7: 24, 9: 16},
    6: {1: 48, 3: 40, 5: 32, 7: 24, 9: 16},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="rows (default: all)")
    arguments.add_argument("--picture", help="PNG of all rows")
    args = arguments.parse_args()
    model = real_model(args.model)
    validation = real_batches(model, "val")
    dense = stratavit.evaluate(model, validation).top1
    rows = []
    for what in args.only:
        if what == "tome":
            rows.append(merged_everywhere(model, validation))
        elif what == "fixed":
            net = stratavit.SuperNet(model).eval()
            rows.append(row_of(net, validation, "fixed tokens, full width", {n: fixed(net, n) for n in FIXED}))
        else:
            options = {"method": "paper"} if what == "paper" else {"axes": ("width", "tokens")}
            net = converted(args.model, WORK, **options)
            rows.append(row_of(net, validation, TITLES[what], specs_of(net, "width" if what == "paper" else what)))
    if args.picture:
        lines = others(args.model, dense) | {
            row["what"]: [(1.0, dense), *((row[f"share {n}/12"], row[f"{n}/12"]) for n in TWELFTHS if row[f"{n}/12"])]
            for row in rows
        }
        draw_lines(lines, args.picture, f"{args.model}, calibrated on 1,000 images, no training", best=TITLES["both"])
    note = (
        f"Dense: {dense:.1f}. {sum(len(labels) for _, labels in validation)} validation images, 1,000 for calibration. "
        "Tokens: block:patch tokens that it passes on, of 196."
    )
    write_results(f"tokens-{args.model}", rows, note)


def others(model: str, dense: float) -> dict[str, list[tuple[float, float]]]:
    """Pruning criteria and other tools, from the newest table of `quality.py`."""
    path = sorted(RESULTS.glob(f"*-quality-{model}.csv"))[-1]
    with path.open(encoding="utf-8", newline="") as file:
        lines = quality.lines_of(list(csv.DictReader(file)), dense)
    return {label: lines[label] for label in lines if label not in (quality.OURS, "the paper, one-shot")}


def specs_of(net: stratavit.SuperNet, axes: str) -> dict[int, stratavit.Spec]:
    """Twelfths of the MACs -> spec, of those within reach."""
    found = {}
    for twelfths in TWELFTHS:
        with suppress(BudgetError):
            found[twelfths] = net.spec(macs=twelfths / 12, axes=axes)
    return found


def merged_everywhere(model: nn.Module, validation: Batches) -> dict[str, Any]:
    """Top-1 of `TokenMerging` with the smallest r that keeps each budget."""
    row: dict[str, Any] = {"what": TITLES["tome"]}
    for twelfths in TWELFTHS:
        found = tome.within(model, twelfths / 12)
        row[f"{twelfths}/12"] = found and round(stratavit.evaluate(found[0], validation).top1, 1)
        row[f"share {twelfths}/12"] = found and round(found[1], 3)
        row[f"tokens {twelfths}/12"] = found and f"r={found[0].r}"
    print(row, flush=True)
    return row


def fixed(net: stratavit.SuperNet, twelfths: int) -> stratavit.Spec:
    """Fixed numbers of tokens for a share of the MACs, all layers at full width."""
    left, spec = net.cost.places[0].width, {}
    for block, merged in FIXED[twelfths].items():
        left -= merged
        spec[f"blocks.{block}.tokens"] = left
    return stratavit.Spec(spec)


def row_of(
    net: stratavit.SuperNet, validation: Batches, what: str, specs: Mapping[int, stratavit.Spec]
) -> dict[str, Any]:
    """Top-1, share of the MACs and tokens at each size."""
    row: dict[str, Any] = {"what": what}
    for twelfths in TWELFTHS:
        spec = net.resolve(specs.get(twelfths))
        known = twelfths in specs
        counts = [f"{name.split('.')[1]}:{n}" for name, n in spec.items() if name.endswith(".tokens")]
        row[f"{twelfths}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1) if known else ""
        row[f"share {twelfths}/12"] = round(net.macs(spec) / net.macs(), 3) if known else ""
        row[f"tokens {twelfths}/12"] = " ".join(counts)
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
