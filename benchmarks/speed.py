"""What each stage costs, as a ratio within one run, for three shapes; and how it grows.

    python benchmarks/speed.py [--repeat 3] [--growth]

`--growth`: only how an elastic step, extraction and latency grow, a few minutes.

DeiT-Ti, -S and -B at 224 pixels, weights and images random (times do not depend on them). Growth: seconds against
images, width and depth, one of them at a time, with the exponent of the power law that fits best. Peaks: the resident
set of a fresh process for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import Batches, anew, as_if_contracted, even, grown, interleaved, noise, plain, write_results
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stratavit import SuperNet
from stratavit.calibration.statistics import collect
from stratavit.spec import Spec

SHAPES = {
    "DeiT-Ti": ("deit_tiny_patch16_224", 64),
    "DeiT-S": ("deit_small_patch16_224", 32),
    "DeiT-B": ("deit_base_patch16_224", 16),
}
BATCH, SHARE = 16, 0.5
ALONE = "One quantity varied, the others at width 192, depth 3 and 16 images in one batch; extraction has no images."
GROWTH = {"images": (16, 32, 64, 128), "width": (192, 384, 576, 768), "depth": (3, 6, 12, 24)}
Row = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--growth", action="store_true", help="of step, extraction and latency; nothing else")
    arguments.add_argument("--peak", nargs=2, metavar=("SHAPE", "WHAT"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    torch.manual_seed(0)
    if args.peak:
        print(peak_of(*args.peak))
        return
    if args.growth:
        grown_rows = [line for what, values in GROWTH.items() for line in slice_growth_rows(what, values, args.repeat)]
        write_results(
            "speed-growth", grown_rows, f"Medians of {args.repeat}; half of the MACs, moments made up. {ALONE}"
        )
        return
    rows: list[Row] = []
    for shape, (name, images) in SHAPES.items():
        rows += shape_rows(shape, timm.create_model(name).eval(), noise(images, BATCH), args.repeat)
        grown = {what: int(anew("--peak", shape, what)) for what in ("plain", "contract")}
        rows.append(
            row(shape, "contract, peak MiB", grown["contract"] / 1024, grown["contract"] / grown["plain"], "plain pass")
        )
        print(rows[-1], flush=True)
    for what, values in GROWTH.items():
        rows += growth_rows(what, values, args.repeat)
    note = (
        f"Medians of {args.repeat}, runs taking turns. Plain pass: forward + backward over the same images, weights "
        f"and all, batches of {BATCH}. Elastic step and latency: {SHARE:.0%} of the MACs, same ratio everywhere; their "
        "ratio is time over the dense one's, over the share of MACs kept: 1 is as fast as MACs promise. Extraction: "
        "everything recomputed. Growth: a linear map's cost grows with the square of the width; exponents of the plain "
        "pass stand beside. With so few images the part of contract that does not depend on them, linear algebra that "
        "grows with the cube of the hidden width, weighs heavily: most of DeiT-B's time is that."
    )
    write_results("speed", rows, note)


def row(shape: str, what: str, value: float, ratio: float | str, to: str) -> Row:
    return {"shape": shape, "what": what, "value": value, "ratio": ratio, "to": to}


def shape_rows(shape: str, model: nn.Module, batches: Batches, repeat: int) -> list[Row]:
    """All stages of one shape."""
    net = SuperNet(model)
    passes = interleaved(
        {
            "plain": partial(plain, model, batches),
            "calibration pass, paper": partial(collect, net.model, batches),
            "contract, default": lambda: SuperNet(model).contract(batches),
        },
        repeat,
    )
    base = passes.pop("plain")
    count = sum(len(labels) for _, labels in batches)
    rows = [
        row(shape, f"{what}, {count} images, s", value, value / base, "plain pass") for what, value in passes.items()
    ]
    net.contract(batches)
    spec = even(net, SHARE)
    kept = net.macs(spec) / net.macs()
    steps = interleaved(
        {"dense": partial(step, net, batches[0], None), "half": partial(step, net, batches[0], spec)}, repeat
    )
    rows.append(
        row(shape, "elastic step, s", steps["half"], steps["half"] / steps["dense"] / kept, "dense step x MACs")
    )
    extraction = interleaved({"extract": partial(net.extract, spec=spec, verbose=False)}, repeat)["extract"]
    rows.append(row(shape, "extraction, s", extraction, extraction / base, "plain pass"))
    small, images = net.extract(spec=spec).eval(), batches[0][0]
    for size in (1, BATCH):
        answers = interleaved(
            {"dense": partial(answer, model, images[:size]), "half": partial(answer, small, images[:size])}, 3 * repeat
        )
        ratio = answers["half"] / answers["dense"] / kept
        rows.append(row(shape, f"latency, batch {size}, s", answers["half"], ratio, "dense x MACs"))
    for line in rows:
        print(line, flush=True)
    return rows


def step(net: SuperNet, batch: tuple[torch.Tensor, torch.Tensor], spec: Spec | None) -> None:
    """Forward and backward of a prefix, compensated by means as PIAD trains."""
    net.train()
    net.compensation = "mean"
    F.cross_entropy(net(batch[0], spec), batch[1]).backward()
    net.zero_grad(set_to_none=True)
    net.compensation = "full"
    net.eval()


@torch.inference_mode()
def answer(model: nn.Module, images: torch.Tensor) -> None:
    model(images)


def peak_of(shape: str, what: str) -> int:
    """Growth of this process's resident set, KiB."""
    name, images = SHAPES[shape]
    model, batches = timm.create_model(name).eval(), noise(images, BATCH)
    runs: Mapping[str, Callable[[], object]] = {
        "plain": partial(plain, model, batches),
        "contract": lambda: SuperNet(model).contract(batches),
    }
    return grown(runs[what])


def growth_rows(what: str, values: tuple[int, ...], repeat: int) -> list[Row]:
    """Exponents of the plain pass and of contract against one quantity."""
    seconds: dict[str, list[float]] = {"plain pass": [], "contract, default": []}
    for value in values:
        sizes = {"images": BATCH, "width": 192, "depth": 3} | {what: value}
        model = VisionTransformer(embed_dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["width"] // 64).eval()
        batches = noise(sizes["images"], BATCH)
        runs = {"plain pass": partial(plain, model, batches), "contract, default": partial(contract, model, batches)}
        for name, time in interleaved(runs, repeat).items():
            seconds[name].append(time)
    rows = []
    for name, times in seconds.items():
        exponent = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        rows.append(row(f"{what} {values[0]} to {values[-1]}", f"{name}, growth exponent", exponent, "", ""))
        print(rows[-1], [round(time, 3) for time in times], flush=True)
    return rows


def slice_growth_rows(what: str, values: tuple[int, ...], repeat: int) -> list[Row]:
    """Exponents of an elastic step, of extraction and of a small model's latency against one quantity."""
    seconds: dict[str, list[float]] = {}
    for value in values:
        sizes = {"images": BATCH, "width": 192, "depth": 3} | {what: value}
        model = VisionTransformer(embed_dim=sizes["width"], depth=sizes["depth"], num_heads=sizes["width"] // 64).eval()
        net = as_if_contracted(model)
        net.compensation = "full"
        (batch,), spec = noise(sizes["images"], sizes["images"]), even(net, SHARE)
        small = net.extract(spec=spec).eval()
        runs: dict[str, Callable[[], object]] = {
            "dense step": partial(step, net, batch, None),
            "elastic step": partial(step, net, batch, spec),
            "latency": partial(answer, small, batch[0]),
        }
        if what != "images":
            runs["extraction"] = partial(net.extract, spec=spec, verbose=False)
        for name, time in interleaved(runs, repeat).items():
            seconds.setdefault(name, []).append(time)
    rows = []
    for name, times in seconds.items():
        exponent = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        each = {f"s at {place}": time for place, time in zip(("first", "second", "third", "last"), times, strict=True)}
        rows.append(
            {"quantity": f"{what} {values[0]} to {values[-1]}", "what": name, "growth exponent": exponent} | each
        )
        print(rows[-1], flush=True)
    return rows


def contract(model: nn.Module, batches: Batches) -> None:
    SuperNet(model).contract(batches)


if __name__ == "__main__":
    main()
