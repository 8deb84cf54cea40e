"""What a conversion costs against plain forward + backward over the same images, in one run; and extraction time.

    python benchmarks/conversion_cost.py [--images 1000] [--repeat 3]
    python benchmarks/conversion_cost.py --extraction [--before SRC] [--repeat 9]

Peak memory is the growth of the process's resident set, each measured in a fresh process. `--extraction`: extraction
alone, without data; with ``--before`` (the ``src`` folder of another checkout) processes of both trees take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from common import anew, as_if_contracted, grown, interleaved, plain, real_batches, real_model, write_results
from torch import Tensor

import stratavit
from stratavit.calibration.statistics import collect

TITLES = {
    "plain": "plain forward + backward",
    "paper": "calibration pass, paper",
    "contract": "contract, default",
    "default": "contract + stratify, default",
}
SHARES = (0.75, 0.5, 0.25)  # of every width
SITES = {  # outputs and channels of twelve sites
    "DeiT-Tiny attention": (192, 192),
    "DeiT-Tiny MLP": (192, 768),
    "DeiT-Base attention": (768, 768),
    "DeiT-Base MLP": (768, 3072),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--extraction", action="store_true", help="extraction and its solves, nothing else")
    arguments.add_argument("--before", type=Path, help="src folder of another checkout, measured in turns")
    arguments.add_argument("--rounds", type=int, default=3, help="processes of each tree (default: %(default)s)")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments.add_argument("--peak", choices=("none", *TITLES), default="none", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.child:
        torch.set_num_threads(1)
        print(json.dumps(extraction(args.repeat, time.process_time) | solves(args.repeat)))
        return
    if args.extraction:
        compare_extraction(args.before, args.repeat, args.rounds)
        return
    model = real_model("deit_tiny")
    batches = real_batches(model, "train", limit=args.images)
    net = stratavit.SuperNet(model)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batches),
        "paper": lambda: collect(net.model, batches),
        "contract": lambda: stratavit.SuperNet(model).contract(batches),
        "default": lambda: stratavit.SuperNet(model).contract(batches).stratify(batches),
    }
    if args.peak != "none":
        print(grown(runs[args.peak]))
        return
    rows: list[dict[str, str | float]] = []
    plain(model, batches[:2])  # warm up
    seconds = interleaved(runs, args.repeat)
    memory = {name: int(anew("--images", str(args.images), "--peak", name)) for name in ("plain", "default")}
    base = seconds["plain"]
    for name in runs:
        median = seconds[name]
        rows.append({"what": f"{TITLES[name]}, {args.images} images, seconds", "value": median, "ratio": median / base})
        if name not in memory:
            continue
        rows.append(
            {"what": f"{TITLES[name]}, peak MiB", "value": memory[name] / 1024, "ratio": memory[name] / memory["plain"]}
        )
    rows += [{"what": what, "value": value, "ratio": ""} for what, value in extraction(5).items()]
    note = (
        f"Passes: medians of {args.repeat}; extraction: of 5; peaks: one fresh process each. "
        "Ratios to the plain pass (forward + backward, weights and all)."
    )
    write_results("conversion-cost", rows, note)


def extraction(repeat: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds to extract from DeiT-Base, the numbers in it random: time does not depend on them."""
    net = as_if_contracted(timm.create_model("deit_base_patch16_224"))
    runs: dict[str, Callable[[], object]] = {}
    for share in SHARES:
        spec = {site.name: int(share * site.width) for site in net.sites}
        for what in ("by means", "first", "further"):
            runs[f"extract DeiT-Base, every width x {share}, {what}, seconds"] = partial(extract, net, spec, what)
    return interleaved(runs, repeat, clock)


def extract(net: stratavit.SuperNet, spec: dict[str, int], what: str) -> None:
    """One extraction, compensated by means or in full; the `first` finds nothing that another one has computed."""
    net.compensation = "mean" if what == "by means" else "full"
    if what == "first":
        for module in net.elastic.values():
            module.projected = None
    net.extract(spec=spec, verbose=False)


def solves(repeat: int) -> dict[str, float]:
    """Seconds of the triangular solves of twelve sites at half of their widths, one by one and in one call."""
    found = {}
    for name, (outputs, channels) in SITES.items():
        keep = channels // 2
        factors = [torch.eye(channels) + 0.01 * torch.randn(channels, channels).tril() for _ in range(12)]
        products = [torch.randn(outputs, keep) for _ in factors]
        runs: dict[str, Callable[[], object]] = {
            "one by one": partial(solve_alone, factors, products, keep),
            "in one call": partial(solve_together, factors, products, keep),
        }
        for how, seconds in interleaved(runs, 3 * repeat, time.process_time).items():
            found[f"solves of 12 {name} sites, {how}, seconds"] = seconds
    return found


def solve_alone(factors: list[Tensor], products: list[Tensor], keep: int) -> None:
    for factor, product in zip(factors, products, strict=True):
        torch.linalg.solve_triangular(factor[:keep, :keep].contiguous(), product, upper=False, left=False)


def solve_together(factors: list[Tensor], products: list[Tensor], keep: int) -> None:
    stacked = torch.stack([factor[:keep, :keep] for factor in factors])
    torch.linalg.solve_triangular(stacked, torch.stack(products), upper=False, left=False)


def compare_extraction(before: Path | None, repeat: int, rounds: int) -> None:
    """Writes seconds of extraction and of solves; with those of another tree, and the median ratio of a round."""
    trees = {"after": Path(__file__).parents[1] / "src"} | ({"before": before} if before else {})
    runs: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    for _ in range(rounds):
        for tree, source in trees.items():
            command = [sys.executable, __file__, "--child", "--repeat", str(repeat)]
            output = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(source.resolve())}, text=True)
            runs[tree].append(json.loads(output.splitlines()[-1]))
    rows = []
    for what in runs["after"][0]:
        row: dict[str, str | float] = {"what": what}
        row |= {tree: statistics.median(one[what] for one in found) for tree, found in runs.items()}
        if before:
            pairs = zip(runs["after"], runs["before"], strict=True)
            row["after / before"] = statistics.median(new[what] / old[what] for new, old in pairs)
        rows.append(row)
    note = (
        f"Medians of {rounds} processes, each the median of {repeat} runs in turns ({3 * repeat} of solves). Seconds "
        "of one processor: other programs change them little. Weights and moments are random. `first`: "
        "nothing is kept of earlier extractions; `further`: after one of this size or a larger one. Solves: one matrix "
        "after the other, or one batched call, stacking included; the same code in both trees."
    )
    write_results("extraction", rows, note)


if __name__ == "__main__":
    main()
