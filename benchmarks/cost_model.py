"""Hours and memory of each stage at the scale of ImageNet, by arithmetic; `scale.py` checks it against measurements.

    python benchmarks/cost_model.py [--gpus 8] [--peak 989] [--efficiency 0.2 0.4]

A dense training step costs three forward passes: forward, and backward to activations and to weights. Every stage is
counted in such steps by factors measured in this repository (`results/`): what a stage costs over a plain forward +
backward of as many images. `peak` is the accelerator's, in TFLOP/s at the precision of training; `efficiency` the part
of it that a dense step of this model reaches, which must be measured where it runs: it depends on model and batch.
"""

from __future__ import annotations

import argparse

import timm
from common import write_results

from stratavit import SuperNet

IMAGENET, VALIDATION, CALIBRATION = 1_281_167, 50_000, 1_024
CONTRACT, CONVERT = 1.29, 2.64  # results/2026-11-25-conversion-cost.md: contract; contract + stratify
# results/2026-11-25-piad-cost.md: forward + backward over dense ones, of a PIAD epoch, at 1.5/12, of a step at 6/12
EPOCH, SMALLEST, HALF = 0.582, 0.2235, 0.513
FORWARD = 1 / 3  # of a step
STAGES = {"deit_tiny_patch16_224": 300, "deit_small_patch16_224": 300, "deit_base_patch16_224": 150}  # epochs (paper)
RUNGS = 11  # sizes of a curve, from 12/12 down to 2/12
MEAN_RUNG = sum(range(2, 13)) / 12 / RUNGS


def piad_factor(epoch: float, distil: bool = False) -> float:
    """Cost of a step of PIAD over a dense one; a teacher adds a forward pass of the full network."""
    return epoch + (FORWARD if distil else 0.0)


def steps(stage: str, epochs: int) -> float:
    """Images of a dense training step that cost as much as a stage."""
    return {
        "convert (1,024 images)": CONVERT * CALIBRATION,
        "PIAD": piad_factor(EPOCH) * epochs * IMAGENET + CALIBRATION * epochs,
        "PIAD, full size at every batch (sandwich)": (1 + EPOCH + SMALLEST) * epochs * IMAGENET + CALIBRATION * epochs,
        "fine-tune one size at 6/12, 30 epochs": HALF * 30 * IMAGENET,
        "curve of 11 sizes": FORWARD * RUNGS * MEAN_RUNG * VALIDATION,
    }[stage]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpus", type=int, default=8)
    arguments.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of one (default: H100 SXM, bf16, dense)")
    arguments.add_argument("--efficiency", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    args = arguments.parse_args()
    rows = []
    for name, epochs in STAGES.items():
        net = SuperNet(timm.create_model(name))
        flops = 3 * 2 * net.macs(attention=True)  # of a dense step, per image
        for stage in (
            "convert (1,024 images)",
            "PIAD",
            "PIAD, full size at every batch (sandwich)",
            "fine-tune one size at 6/12, 30 epochs",
            "curve of 11 sizes",
        ):
            gpus = 1 if stage.startswith("convert") else args.gpus
            row: dict[str, str | float] = {"model": name.split("_patch")[0], "stage": stage, "GPUs": gpus}
            total = steps(stage, epochs) * flops
            row["EFLOP"] = total / 1e18
            for efficiency in args.efficiency:
                row[f"hours at {efficiency:.0%}"] = total / (gpus * args.peak * 1e12 * efficiency) / 3600
            rows.append(row)
    note = (
        f"Arithmetic, not measured on a GPU: {args.gpus} GPUs of {args.peak:.0f} TFLOP/s. Reading and augmenting of "
        f"images is not in it. PIAD runs {', '.join(map(str, STAGES.values()))} epochs, as in the paper."
    )
    write_results("cost-model", rows, note)


if __name__ == "__main__":
    main()
