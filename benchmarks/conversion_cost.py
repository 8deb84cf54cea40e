"""What a conversion costs: calibration against plain forward + backward in the same run, and extraction time.

    python benchmarks/conversion_cost.py [--images 256]

Peak memory is the growth of the process's resident set, each measured in a fresh process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import Batches, real_batches, real_model, write_results

import stratavit
from stratavit.statistics import collect


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=256)
    arguments.add_argument("--peak", choices=("none", "plain", "paper"), default="none", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    model = real_model("deit_tiny")
    batches = real_batches(model, "train", limit=args.images)
    net = stratavit.SuperNet(model)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batches),
        "paper": lambda: collect(net.model, batches),
    }
    if args.peak != "none":
        before = peak()
        runs[args.peak]()
        print(peak() - before)
        return
    rows: list[dict[str, str | float]] = []
    seconds = {name: [] for name in runs}
    for run in runs.values():  # warm up
        run()
    for _ in range(5):  # interleaved, so that a busy machine slows both
        for name, run in runs.items():
            seconds[name].append(timed(run))
    memory = {name: growth(name, args.images) for name in runs}
    base = statistics.median(seconds["plain"])
    for name in runs:
        median = statistics.median(seconds[name])
        rows.append({"what": f"{name} pass, {args.images} images, seconds", "value": median, "ratio": median / base})
        rows.append(
            {"what": f"{name} pass, peak MiB", "value": memory[name] / 1024, "ratio": memory[name] / memory["plain"]}
        )
    base_net = stratavit.SuperNet(timm.create_model("deit_base_patch16_224"))
    half = {site.name: site.width // 2 for site in base_net.sites}
    times = [timed(lambda: base_net.extract(spec=half)) for _ in range(5)]
    rows.append({"what": "extract DeiT-Base at 50 %, seconds", "value": statistics.median(times), "ratio": ""})
    write_results(
        "conversion-cost", rows, "Medians of 5; ratios to the plain pass (forward + backward, weights and all)."
    )


def plain(model: torch.nn.Module, batches: Batches) -> None:
    """What a user would run to get gradients: forward and backward through everything."""
    for images, labels in batches:
        model(images).gather(1, labels[:, None]).sum().backward()
        model.zero_grad(set_to_none=True)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak() -> int:
    """Largest resident set of this process so far, KiB (Linux; getrusage would count the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def growth(name: str, images: int) -> int:
    command = [sys.executable, __file__, "--images", str(images), "--peak", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
