"""Does latency follow MACs? Extracted models beside the dense one, eager, compiled and in ONNX Runtime.

    python benchmarks/latency.py [--models tokens] [--batch-size 1] [--runtimes eager compiled onnx]
    python benchmarks/latency.py --models tokens --device cuda --dtype bfloat16 --batch-size 256 --runtimes eager

`deit_tiny`: real weights, width list; `tokens`: the list over width and tokens of the same network. `deit_small`:
random weights, the same keep ratio at every site. Models take turns. `--profile`: where the time of a pass goes,
by kind of operation, in place of the timing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from common import WORK, converted, write_results
from torch import nn

from stratavit import Setting, SuperNet
from stratavit.dropout_list.allocation import allocate
from stratavit.evaluation.benchmark import bench
from stratavit.evaluation.latency import Precision, Runtime

TWELFTHS = (10, 8, 6, 4)
MODELS = ("deit_tiny", "deit_small")
SIZE = (3, 224, 224)
PASSES, ROUNDS = 5, 15  # of a profile
KINDS = {  # an operation's name holds -> what it is
    "addmm": "linear layers",
    "scaled_dot_product": "attention",
    "convolution": "patch embedding",
    "layer_norm": "norms, activations",
    "gelu": "norms, activations",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=[*MODELS, "tokens"], default=list(MODELS))
    arguments.add_argument("--runtimes", nargs="+", choices=get_args(Runtime), default=["eager", "onnx"])
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--seconds", type=float, default=5.0, help="per model and runtime")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=get_args(Precision), help="of weights and images (default: float32)")
    arguments.add_argument("--profile", action="store_true", help="milliseconds of each kind of operation, eager")
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        net, specs = made(name, args.work)
        net.to(args.device)
        models = {"dense": net.extract(spec={})} | {f"{n}/12": net.extract(spec=spec) for n, spec in specs.items()}
        if args.profile:
            images = torch.randn(args.batch_size, *SIZE, device=args.device)
            rows += [{"model": name, "size": size} | found for size, found in profiled(models, images).items()]
            continue
        settings = [
            Setting(args.batch_size, runtime, args.dtype, args.threads, args.seconds) for runtime in args.runtimes
        ]
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
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    note = f"Device: {device}, {args.dtype or 'float32'}. " + (
        f"Milliseconds of an eager pass of {args.batch_size} images by kind of operation, median of {ROUNDS} rounds."
        if args.profile
        else "MACs ratio: dense over small. DeiT-Tiny: the list made from 1,000 images; "
        "DeiT-Small: random weights, one keep ratio for all sites."
    )
    usual = args.models == list(MODELS) and not args.profile and args.device == "cpu"
    parts = ["latency", *args.models, *(["profile"] if args.profile else []), f"batch{args.batch_size}"]
    parts += [] if args.device == "cpu" else [args.device.split(":")[0]]
    write_results("latency" if usual else "-".join(parts), rows, note)


@torch.inference_mode()
def profiled(models: Mapping[str, nn.Module], images: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Milliseconds of a pass by kind of operation, and the number of operations; models take turns."""
    rounds: dict[str, list[dict[str, float]]] = {size: [] for size in models}
    for _ in range(ROUNDS):
        for size, model in models.items():
            model.eval()(images)
            with torch.profiler.profile() as profile:
                for _ in range(PASSES):
                    model(images)
            spent = dict.fromkeys([*KINDS.values(), "all other", "operations"], 0.0)
            for event in profile.key_averages():
                micro = event.self_device_time_total if images.is_cuda else event.self_cpu_time_total
                kind = next((kind for word, kind in KINDS.items() if word in event.key), "all other")
                spent[kind] += micro / 1000 / PASSES
                spent["operations"] += event.count / PASSES
            rounds[size].append(spent)
    return {
        size: {kind: statistics.median(one[kind] for one in found) for kind in found[0]}
        for size, found in rounds.items()
    }


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
