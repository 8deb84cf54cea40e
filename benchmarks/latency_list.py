"""A list that follows latency against one that follows MACs, at equal measured latency. DeiT-Tiny, no training.

python benchmarks/latency_list.py [--work WORK]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import WORK, converted, correct, real_batches, write_results

from stratavit import Setting
from stratavit.evaluation.benchmark import bench

SHARES = (0.8, 0.65, 0.5)
PRICES = ("macs", "latency")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where converted models are kept")
    arguments.add_argument("--batch-size", type=int, default=1)
    args = arguments.parse_args()
    setting = Setting(args.batch_size)
    nets = {"macs": converted("deit_tiny", args.work)}
    nets["latency"] = converted("deit_tiny", args.work, price="latency")
    loader = real_batches(nets["macs"], "val")
    rows = []
    for share in SHARES:
        specs = {price: net.spec(latency_ms=f"{100 * share}%", setting=setting) for price, net in nets.items()}
        models = {"dense": nets["macs"].extract(spec={})}
        models |= {price: nets[price].extract(spec=spec) for price, spec in specs.items()}
        times = {row.model: row for row in bench(models, (3, 224, 224), [Setting(args.batch_size, seconds=6)])}
        right = {price: correct(nets[price], spec, loader) for price, spec in specs.items()}
        difference = 100 * (right["latency"] - right["macs"])
        for price, spec in specs.items():
            net = nets[price]
            rows.append(
                {
                    "latency share asked": share,
                    "list follows": price,
                    "latency share": times[price].median_ms / times["dense"].median_ms,
                    "MACs share": net.macs(spec) / net.macs(),
                    "attention width": sum(w for name, w in spec.items() if name.endswith("attn")) / (12 * 64),
                    "MLP width": sum(w for name, w in spec.items() if name.endswith("mlp")) / (12 * 768),
                    "top-1": 100 * float(right[price].mean()),
                    "paired difference": ""
                    if price == "macs"
                    else f"{float(difference.mean()):+.2f} +- {float(difference.std()) / len(difference) ** 0.5:.2f}",
                }
            )
    lines = nets["latency"].provenance["stratify"]["prices"]
    prices = {leaf: lines[f"blocks.0.{leaf}"] for leaf in ("attn", "mlp")}
    note = (
        f"Batch {args.batch_size}, eager. Milliseconds per batch as timed for the list, start and per coordinate: "
        f"{prices}. {len(loader[0][0]) and sum(len(images) for images, _ in loader)} validation images."
    )
    write_results(f"latency-list-batch{args.batch_size}", rows, note)


if __name__ == "__main__":
    main()
