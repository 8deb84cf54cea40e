"""What each part of the default method adds, without training: top-1 at a ladder of budgets.

    python benchmarks/one_shot.py --model deit_tiny [--picture PNG] [--images 1000]

Calibrates on the training images, reports top-1 on the validation images. `uniform` rows keep the same ratio of
every site; the list rows keep what the dropout list says.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from common import MODELS, Batches, draw_lines, real_batches, real_model, write_results

import stratavit
from stratavit.dropout_list.allocation import allocate
from stratavit.elastic.compensation import GAIN

TWELFTHS = (10, 8, 6, 4)
Row = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--images", type=int, default=1000, help="calibration images")
    arguments.add_argument("--picture", help="PNG of the rows")
    args = arguments.parse_args()
    model = real_model(args.model)
    calibration, validation = real_batches(model, "train", args.images), real_batches(model, "val")
    dense = stratavit.evaluate(model, validation).top1
    rows = ladder(stratavit.SuperNet(model), calibration, validation)
    note = f"Dense: {dense:.1f}. {sum(len(y) for _, y in validation)} validation images, {args.images} for calibration."
    if args.picture:
        draw(rows, dense, args.picture, f"{args.model}, calibrated on {args.images} images, no training")
    write_results(f"one-shot-{args.model}", rows, note)


def ladder(net: stratavit.SuperNet, calibration: Batches, validation: Batches) -> list[Row]:
    """One row for each part added. `net` is contracted anew where a part needs it; its function stays the same."""
    rows: list[Row] = []

    def add(what: str, specs: Mapping[int, stratavit.Spec]) -> None:
        row: Row = {"what": what}
        for twelfths, spec in specs.items():
            row[f"{twelfths}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1)
            row[f"share {twelfths}/12"] = round(net.macs(spec) / net.macs(), 4)
        rows.append(row)
        print(row, flush=True)

    same = uniform(net)
    listed = lambda: {n: net.spec(macs=n / 12) for n in TWELFTHS}  # noqa: E731
    net.contract(calibration, method="paper").stratify(calibration)
    add("paper: WPAC and its own one-shot list", listed())
    add("paper: WPAC, uniform ratios", same)
    net.contract(calibration, token_weight=0.0)
    for site in net.elastic.values():
        site.gain = 0.0
    net.compensation = "mean"
    add("output-aware coordinates, elimination order, means kept; uniform", same)
    net.compensation = "full"
    add("+ closed-form compensation; uniform", same)
    net.contract(calibration)
    add("+ moments half weighted by gradient norms; uniform", same)
    for site in net.elastic.values():
        site.gain = GAIN
    add("+ output energy half restored; uniform", same)
    net.stratify(calibration)
    mean, net.final_mean = net.final_mean, None
    add("+ list from effects at cut networks", listed())
    net.final_mean = mean
    add("+ final mean: the default method", listed())
    return rows


def uniform(net: stratavit.SuperNet) -> dict[int, stratavit.Spec]:
    """The same keep ratio everywhere, as near below each budget as whole units allow."""
    ratios, caps = ({site.name: value(site) for site in net.sites} for value in (lambda _: 0.0, lambda s: s.width))
    return {n: stratavit.Spec(allocate(net.cost, ratios, n / 12, caps)) for n in TWELFTHS}


def draw(rows: list[Row], dense: float, path: str, title: str) -> None:
    """Top-1 against share of MACs, a line a row."""
    lines = {row["what"]: [(1.0, dense), *((row[f"share {n}/12"], row[f"{n}/12"]) for n in TWELFTHS)] for row in rows}
    draw_lines(lines, path, title, first="--")


if __name__ == "__main__":
    main()
