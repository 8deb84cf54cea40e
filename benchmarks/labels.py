"""Calibration without labels against calibration with them: paired differences in top-1.

    python benchmarks/labels.py --model deit_tiny

Two folds of the training images: calibrated on one, tested on the other and on the validation images, so that every
image at hand is tested by a network that has not seen it. Differences are paired by image; intervals are 95 %. All are
cut at the widths of one list, made with labels: making a list needs none in any case.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import MODELS, correct, real_batches, real_model, write_results
from torch import Tensor

import stratavit

TWELFTHS = (10, 8, 6, 4)
HELD_OUT = 500
OBJECTIVES = ("cross_entropy", "sampled", "prediction", "feature")  # the first makes the list


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    args = arguments.parse_args()
    model = real_model(args.model)
    train, validation = real_batches(model, "train"), real_batches(model, "val")
    folds = (train[::2], train[1::2])
    right: dict[str, dict[int, list[Tensor]]] = {name: {n: [] for n in TWELFTHS} for name in OBJECTIVES}
    for calibration, held_out in (folds, folds[::-1]):
        specs: dict[int, stratavit.Spec] = {}
        for name in OBJECTIVES:
            net = stratavit.SuperNet(model).contract(calibration, objective=name)  # type: ignore[arg-type]
            if not specs:
                net.stratify(calibration)
                specs = {n: net.spec(macs=n / 12) for n in TWELFTHS}
                net.final_mean = None  # is measured with the list; the others have none
            for n in TWELFTHS:
                right[name][n] += [correct(net, specs[n], batches) for batches in (held_out, validation)]
            print(name, {n: float(torch.cat(found).mean()) for n, found in right[name].items()}, flush=True)
    rows = [summary(name, right) for name in OBJECTIVES]
    note = (
        "1,000 training images held out once each, 433 validation images, answers of both folds averaged. Without "
        "labels `sampled` is the default, with them `cross_entropy`; differences to the latter, points. All at the "
        "same widths, no final mean. Intervals are over images; the draw of the calibration images is not in them."
    )
    write_results(f"labels-{args.model}", rows, note)


def summary(name: str, right: dict[str, dict[int, list[Tensor]]]) -> dict[str, Any]:
    """Top-1 and paired difference at each budget, and the difference over all budgets."""
    row: dict[str, Any] = {"objective": name}
    differences = []
    for n in TWELFTHS:
        ours, base = torch.cat(right[name][n]), torch.cat(right["cross_entropy"][n])
        differences.append(by_image(ours - base))
        row[f"{n}/12"] = round(100 * float(by_image(ours).mean()), 1)
        row[f"difference {n}/12"] = interval(differences[-1])
    row["difference, mean of the four"] = interval(torch.stack(differences).mean(dim=0))
    return row


def by_image(answers: Tensor) -> Tensor:
    """One number an image: `answers` are held out, validation, held out, validation; the latter are averaged."""
    half = len(answers) // 2
    first, second = answers[:half], answers[half:]
    return torch.cat([first[:HELD_OUT], second[:HELD_OUT], (first[HELD_OUT:] + second[HELD_OUT:]) / 2])


def interval(difference: Tensor) -> str:
    """Mean and half-width of the 95 % interval, points."""
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5
    return f"{100 * float(difference.mean()):+.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    main()
