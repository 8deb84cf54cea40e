"""Accuracy against measured latency of lists in default units and in units that suit a GPU. DeiT-Tiny, no training.

`gpu` are head widths in multiples of 32, `whole heads` the same hidden widths and fewer heads.

    python benchmarks/units.py accuracy [--work WORK]
    python benchmarks/units.py latency [--device cuda] [--dtype bfloat16] [--batch-size 256] [--work WORK]

Both parts take the same sizes: what each list gives at shares of the MACs. Join them by list and share. Accuracy needs
no quiet machine, latency does. The converted networks are kept in WORK; a conversion takes some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import WORK, Batches, converted, correct, real_batches, write_results

import stratavit
from stratavit import Setting
from stratavit.evaluation.benchmark import bench

LISTS: dict[str, dict[str, Any]] = {  # units -> options of `common.converted`
    "default": {},
    "gpu": {"units": "gpu"},
    "whole heads": {"units": "gpu", "whole_heads": True},
}
TWELFTHS = (10, 9, 8, 7, 6, 5, 4)
Row = dict[str, Any]
Specs = Mapping[int, stratavit.Spec]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("part", choices=("accuracy", "latency"))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of latency")
    arguments.add_argument("--batch-size", type=int, default=64, help="of latency")
    arguments.add_argument("--seconds", type=float, default=2.0, help="least time for each latency")
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where converted models are kept")
    args = arguments.parse_args()
    nets = {units: converted("deit_tiny", args.work, **options).to(args.device) for units, options in LISTS.items()}
    specs = {units: {n: net.spec(macs=n / 12, axes="width") for n in TWELFTHS} for units, net in nets.items()}
    if args.part == "accuracy":
        batches = real_batches(nets["default"], "val")
        images = sum(len(images) for images, _ in batches)
        note = (
            f"{images} validation images, 1,000 for calibration. Differences are paired, in points, with their error."
        )
        write_results("units-accuracy", accuracies(nets, specs, batches, args.device), note)
        return
    setting = Setting(args.batch_size, dtype=args.dtype, seconds=args.seconds)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    note = f"Batch {args.batch_size}, {args.dtype}, eager, {device}; sizes of a row take turns with the dense model."
    write_results(f"units-latency-{args.device}-batch{args.batch_size}", latencies(nets, specs, setting), note)


def accuracies(
    nets: Mapping[str, stratavit.SuperNet], specs: Mapping[str, Specs], batches: Batches, device: str
) -> list[Row]:
    """Top-1 of every list at every share, and how much units differ from the default on the same images."""
    batches = [(images.to(device), labels.to(device)) for images, labels in batches]
    rows = []
    for twelfths in TWELFTHS:
        right = {units: 100 * correct(net, specs[units][twelfths], batches) for units, net in nets.items()}
        for units, net in nets.items():
            apart = right[units] - right["default"]
            error = float(apart.std()) / len(apart) ** 0.5
            row = described(net, units, twelfths, specs[units][twelfths])
            row["top-1"] = round(float(right[units].mean()), 2)
            row["difference"] = "" if units == "default" else f"{float(apart.mean()):+.2f} +- {error:.2f}"
            rows.append(row)
            print(row, flush=True)
    return rows


def latencies(nets: Mapping[str, stratavit.SuperNet], specs: Mapping[str, Specs], setting: Setting) -> list[Row]:
    """Speed-up over the dense model of every list at every share, and over what the MACs promise."""
    rows = []
    for twelfths in TWELFTHS:
        models = {"dense": nets["default"].extract(spec={}, verbose=False)}
        models |= {units: net.extract(spec=specs[units][twelfths], verbose=False) for units, net in nets.items()}
        for timed in bench(models, (3, 224, 224), [setting])[1:]:
            row = described(nets[timed.model], timed.model, twelfths, specs[timed.model][twelfths])
            row |= {
                "ms": round(timed.median_ms, 3),
                "speed-up": round(timed.speedup, 3),
                "ideal": round(timed.ideal, 3),
            }
            row["of ideal"] = round(timed.speedup / timed.ideal, 3)
            rows.append(row)
            print(row, flush=True)
    return rows


def described(net: stratavit.SuperNet, units: str, twelfths: int, spec: stratavit.Spec) -> Row:
    """What a size is."""
    return {
        "units": units,
        "MACs asked": f"{twelfths}/12",
        "MACs share": round(net.macs(spec) / net.macs(), 4),
        "head widths or heads": listed(width for name, width in spec.items() if name.endswith(".attn")),
        "hidden widths": listed(width for name, width in spec.items() if name.endswith(".mlp")),
    }


def listed(widths: Iterable[int]) -> str:
    """Widths of all blocks."""
    return " ".join(map(str, widths))


if __name__ == "__main__":
    main()
