"""Is a latency budget kept? Five targets; what comes back is extracted and timed anew.

python benchmarks/latency_budgets.py [--work WORK]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import WORK, converted, write_results

from stratavit import Setting, time_model

SHARES = (0.9, 0.75, 0.6, 0.45, 0.35)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=0)
    args = arguments.parse_args()
    net = converted("deit_tiny", args.work)
    setting = Setting(args.batch_size, threads=args.threads)
    size = net.data_config["input_size"]
    dense = time_model(net.extract(spec={}), size, setting).median_ms
    rows = []
    for share in SHARES:
        started = time.perf_counter()
        met = net.budget(latency_ms=share * dense, setting=setting)
        seconds = time.perf_counter() - started
        anew = time_model(net.extract(spec=met.spec), size, Setting(args.batch_size, threads=args.threads, seconds=3))
        rows.append(
            {
                "asked ms": met.asked,
                "got ms": met.got,
                "timed anew ms": anew.median_ms,
                "anew / asked": anew.median_ms / met.asked,
                "MACs share": net.macs(met.spec) / net.macs(),
                "reachable ms": f"{met.low:.2f} to {met.high:.2f}",
                "search s": seconds,
            }
        )
    note = (
        f"DeiT-Tiny, eager, batch {args.batch_size}; asked are shares {SHARES} of the dense latency. Asked: within 1.1."
    )
    write_results(f"latency-budgets-batch{args.batch_size}", rows, note)


if __name__ == "__main__":
    main()
