"""The one-shot dropout list: accuracy at a ladder of budgets, and how well budgets are met.

    python benchmarks/one_shot.py [--model deit_tiny]

Contracts on the 1,000 training images, makes the list from every second batch of them,
reports top-1 on the 433 validation images. No training.
"""

from __future__ import annotations

import argparse

from common import MODELS, real_batches, real_model, write_results

import stratavit
from stratavit.report import LADDER as TWELFTHS
from stratavit.report import curve, plot

LADDER = ("12/12", "10/12", "8/12", "6/12", "4/12")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--picture", help="PNG of the default method's whole curve")
    args = arguments.parse_args()
    model = real_model(args.model)
    calibration, validation = real_batches(model, "train"), real_batches(model, "val")
    # the two methods differ in what replaces a cut channel and where the list may stop, not in coordinates or list
    net = stratavit.SuperNet(model).contract(calibration, method="paper").stratify(calibration[::2])
    rows = []
    for method in ("default", "paper"):
        net.method = method
        gap = largest_gap(net)
        points = curve(net, validation, LADDER if args.picture is None or method == "paper" else TWELFTHS)
        if args.picture and method == "default":
            plot(points, args.picture, f"{args.model}: one conversion, every size, no training")
        for point in points:
            rows.append({"method": method, **vars(point), "largest gap over 50 budgets, share of dense": gap})
            print(rows[-1], flush=True)
    note = "433 validation images; contracted on the 1,000 training images, list from 500 of them."
    write_results(f"one-shot-{args.model}", rows, note)


def largest_gap(net: stratavit.SuperNet) -> float:
    """Largest (asked - got) / dense over 50 budgets from the smallest to the full size; never negative."""
    assert net.strata is not None
    low = net.macs(net.strata.spec(len(net.strata))) / net.macs()
    gaps = []
    for step in range(50):
        met = net.budget(macs=low + (1 - low) * step / 49)
        assert met.got <= met.asked
        gaps.append((met.asked - met.got) / net.macs())
    return max(gaps)


if __name__ == "__main__":
    main()
