"""Time of a pass at a spec over the extracted model's pass: DeiT-Tiny at half of its MACs.

    python benchmarks/elastic_evaluation.py [--before SRC]

Batches of 1, 8 and 64 images, four ways: `net(images, spec)`, the same inside `net.at(spec, fixed=True)` as evaluation
runs it, the same after `specialise`, and one model extracted. Ways take turns in one process; with ``--before`` (the
``src`` folder of another checkout) processes of both trees take turns, too.
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
from contextlib import nullcontext
from pathlib import Path

import timm
import torch

import stratavit

try:
    from stratavit.elastic.compensation import Moments
except ImportError:  # a tree from before the packages
    from stratavit.compensation import Moments

BATCHES = (1, 8, 64)
SPEC = {"attn": 32, "mlp": 384}


def as_if_contracted() -> stratavit.SuperNet:
    """DeiT-Tiny with moments that are made up: time does not depend on the numbers."""
    net = stratavit.SuperNet(timm.create_model("deit_tiny_patch16_224")).eval()
    for module in net.elastic.values():
        n = module.heads * module.full_width
        module.channel_mean = torch.zeros(module.heads, module.full_width)
        module.moments = Moments(torch.eye(n) + 0.01 * torch.randn(n, n).tril(), 1e-3, 1.0)
    return net


def interleaved(runs: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each run; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(repeat: int) -> dict[str, float]:
    """Seconds of a pass, by way and batch."""
    torch.manual_seed(0)
    net = as_if_contracted()
    spec = {site.name: SPEC[site.name.rpartition(".")[2]] for site in net.sites}
    small = net.extract(spec=spec, verbose=False)
    served = as_if_contracted()
    served.specialise(spec, moments=True)
    found = {}
    fixed = net.at(spec, fixed=True) if hasattr(net, "at") else nullcontext()
    with torch.inference_mode(), fixed as inner:
        for batch in BATCHES:
            images = torch.randn(batch, 3, 224, 224)
            ways: dict[str, Callable[[], object]] = {
                "call": lambda x=images: net(x, spec),
                "specialised": lambda x=images: served(x, spec),
                "extracted": lambda x=images: small(x),
            }
            if inner is not None:
                ways["evaluation"] = lambda x=images: inner(x)
            else:  # another tree: what a second call at the same spec costs
                ways["evaluation"] = ways["call"]
            times = interleaved(ways, max(5, repeat // batch))
            found |= {f"{way}, batch {batch}": seconds for way, seconds in times.items()}
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--before", type=Path, help="src folder of another checkout, measured in turns")
    arguments.add_argument("--repeat", type=int, default=64, help="passes of a way at batch 1 (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=3, help="processes of each tree (default: %(default)s)")
    arguments.add_argument("--child", action="store_true", help="measure in this process; used by the script itself")
    args = arguments.parse_args()
    if args.child:
        print(json.dumps(measure(args.repeat)))
        return
    trees = {"after": Path(__file__).parents[1] / "src"} | ({"before": args.before} if args.before else {})
    runs: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    for _ in range(args.rounds):
        for tree, source in trees.items():
            command = [sys.executable, __file__, "--child", "--repeat", str(args.repeat)]
            output = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(source.resolve())}, text=True)
            runs[tree].append(json.loads(output.splitlines()[-1]))
    rows = []
    for batch in BATCHES:
        for way in ("call", "evaluation", "specialised"):
            row = {"pass": way, "batch": batch}
            for tree, found in runs.items():
                ratios = [one[f"{way}, batch {batch}"] / one[f"extracted, batch {batch}"] for one in found]
                row |= {f"over the extracted, {tree}": statistics.median(ratios)}
            rows.append(row)
    note = (
        "DeiT-Tiny, every head_dim 32 of 64 and MLP 384 of 768; random numbers in weights and moments. Medians of "
        f"{args.rounds} processes; ratios within a process, ways in turns. `call` is `net(images, spec)`, `evaluation` "
        "the same with compensated weights fixed for the whole pass, `specialised` after `specialise(moments=True)`."
    )
    from common import write_results  # of this tree

    write_results("elastic-evaluation", rows, note)


if __name__ == "__main__":
    main()
