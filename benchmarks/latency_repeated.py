"""Does a latency budget give the same network twice? Repeated quiet, and beside busy processes.

    python benchmarks/latency_repeated.py [--runs 20] [--latency 80%] [--work WORK]

A busy process multiplies matrices on as many threads as it may. Refusals, and the spread of the MACs that were chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import WORK, converted, write_results

from stratavit import BudgetError, Setting, SuperNet


def multiply() -> None:
    """Keeps processors busy, for as long as the process that began it lives."""
    matrix, parent = torch.randn(512, 512), multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        torch.mm(matrix, matrix)


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """So many busy processes meanwhile."""
    others = [multiprocessing.get_context("spawn").Process(target=multiply, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        time.sleep(3.0 * bool(others))  # until they have started
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def repeated(net: SuperNet, latency: str, setting: Setting, runs: int) -> dict[str, object]:
    """Asks so many times for one budget."""
    shares, spreads, seconds, refused = [], [], [], 0
    for run in range(runs):
        started = time.perf_counter()
        try:
            met = net.budget(latency_ms=latency, setting=setting)
        except BudgetError as error:
            refused += 1
            print(f"run {run}: {error}")
            continue
        finally:
            seconds.append(time.perf_counter() - started)
        shares.append(net.macs(met.spec) / net.macs())
        spreads.append(met.bounds[0].spread / met.got)
        print(f"run {run}: {net.macs(met.spec) / 1e6:.0f}M MACs; {met}", flush=True)
    found: dict[str, object] = {"runs": runs, "refused": refused}
    if shares:
        found |= {
            "MACs share, median": statistics.median(shares),
            "smallest": min(shares),
            "largest": max(shares),
            "standard deviation": statistics.pstdev(shares),
            "spread stated": statistics.median(spreads),
        }
    return found | {"seconds a run": statistics.median(seconds)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--run", type=Path, help="a super-network's folder in place of DeiT-Tiny's")
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--latency", default="80%")
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--seconds", type=float, default=1.0, help="of one timing, at least")
    arguments.add_argument("--busy", type=int, default=1, help="processes beside it in the second half")
    args = arguments.parse_args()
    net = converted("deit_tiny", args.work) if args.run is None else SuperNet.load(args.run)
    setting = Setting(args.batch_size, threads=args.threads, seconds=args.seconds)
    rows = []
    for busy in (0, args.busy):
        with beside(busy):
            rows.append({"busy processes": busy} | repeated(net, args.latency, setting, args.runs))
    note = (
        f"Asked: {args.latency} of the dense latency, eager, batch {args.batch_size}. {setting.used_threads} threads."
    )
    write_results("latency-repeated", rows, note)


if __name__ == "__main__":
    main()
