"""Does latency follow MACs? Extracted models beside the dense one, eager, compiled and in ONNX Runtime.

    python benchmarks/latency.py [--models tokens] [--batch-size 1] [--runtimes eager compiled onnx]

`deit_tiny`: real weights, width list; `tokens`: the list over width and tokens of the same network. `deit_small`:
random weights, the same keep ratio at every site. Models take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import timm
import torch
from common import WORK, converted, write_results

from stratavit import Setting, SuperNet
from stratavit.dropout_list.allocation import allocate
from stratavit.evaluation.benchmark import bench
from stratavit.evaluation.latency import Runtime

TWELFTHS = (10, 8, 6, 4)
MODELS = ("deit_tiny", "deit_small")
SIZE = (3, 224, 224)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=[*MODELS, "tokens"], default=list(MODELS))
    arguments.add_argument("--runtimes", nargs="+", choices=get_args(Runtime), default=["eager", "onnx"])
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--seconds", type=float, default=5.0, help="per model and runtime")
    args = arguments.parse_args()
    rows = []
    for name in args.models:
        net, specs = made(name, args.work)
        models = {"dense": net.extract(spec={})} | {f"{n}/12": net.extract(spec=spec) for n, spec in specs.items()}
        settings = [Setting(args.batch_size, runtime, None, args.threads, args.seconds) for runtime in args.runtimes]
        for row in bench(models, SIZE, settings):
            rows.append(
                {
                    "model": name,
                    "size": row.model,
                    "runtime": row.runtime,
                    "batch": row.batch_size,
                    "median ms": row.median_ms,
                    "p90 ms": row.p90_ms,
                    "images/s": row.images_per_second,
                    "speed-up": row.speedup,
                    "MACs ratio": row.ideal,
                    "speed-up / ratio": row.speedup / row.ideal,
                }
            )
    note = (
        "MACs ratio: dense over small. DeiT-Tiny: the list made from 1,000 images; "
        "DeiT-Small: random weights, one keep ratio for all sites."
    )
    usual = args.models == list(MODELS)
    write_results("latency" if usual else f"latency-{'-'.join(args.models)}-batch{args.batch_size}", rows, note)


def made(name: str, work: Path) -> tuple[SuperNet, dict[int, Mapping[str, int]]]:
    """A super-network, and twelfths of the MACs -> spec."""
    if name == "deit_small":
        torch.manual_seed(0)
        small = SuperNet(timm.create_model("deit_small_patch16_224"))
        even, full = dict.fromkeys(small.resolve(None), 0.0), dict(small.resolve(None))
        return small, {n: allocate(small.cost, even, n / 12, full) for n in TWELFTHS}
    options = {"axes": ("width", "tokens")} if name == "tokens" else {}
    tiny = converted("deit_tiny", work, **options)
    return tiny, {n: tiny.spec(macs=n / 12) for n in TWELFTHS}


if __name__ == "__main__":
    main()
