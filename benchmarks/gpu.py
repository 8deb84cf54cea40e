"""What StrataViT costs on a GPU, and what its small models gain there: all figures of one device by one command.

    python benchmarks/gpu.py [--device cuda] [--parts contract memory training latency conversion] [--models DeiT-Ti]
    python benchmarks/gpu.py --device cpu --quick

Weights and images are random: no figure depends on the numbers. A table for each part: ratios of medians of runs that
took turns with what they are compared with, and the seconds of whole conversions, once. `--quick` runs every part on a
toy, to see that it works; its rows are printed, not kept. Extraction on a CPU: `conversion_cost.py --extraction`;
networks that merge tokens: `latency.py --models tokens --device cuda`; loaders: `piad_cost.py --loader`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import timm
import torch
from common import Batches, even, interleaved, plain, write_results
from piad_cost import clock, in_training, step_rows
from torch import nn

from stratavit import Setting, SuperNet
from stratavit.choices import Units
from stratavit.errors import StrataViTError
from stratavit.evaluation.benchmark import bench

Row = dict[str, Any]
SHAPES: dict[str, tuple[str, int]] = {  # timm's name, images of the ratios
    "DeiT-Ti": ("deit_tiny_patch16_224", 1000),
    "DeiT-S": ("deit_small_patch16_224", 200),
    "DeiT-B": ("deit_base_patch16_224", 200),
    "ViT-L": ("vit_large_patch16_224", 100),
    "DINOv2-S": ("vit_small_patch14_dinov2", 200),
    "DINOv2-B": ("vit_base_patch14_dinov2", 200),
    "DINOv2-L": ("vit_large_patch14_dinov2", 100),
    "DINOv2-g": ("vit_giant_patch14_dinov2", 100),
}
RATIOS = ("DeiT-Ti", "DeiT-S", "DeiT-B", "ViT-L")
STEPS = SLICES = ("DeiT-Ti", "DeiT-S", "DeiT-B")
TWELFTHS = (10, 8, 6, 4)
BATCH, CALIBRATION = 256, 50  # images of a training step and of a timed pass; of a calibration batch


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--images", type=int, help="of a calibration, in place of the default of each model")
    arguments.add_argument("--calibration-batch", type=int, default=CALIBRATION, help="8 for a DINOv2-g on 24 GB")
    arguments.add_argument("--batch-size", type=int, default=BATCH, help="of training and latency")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the same")
    arguments.add_argument("--runtimes", nargs="+", help="of latency (default: all of torch that are there)")
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="a toy in place of every model")
    args = arguments.parse_args()
    if args.quick:
        args.images, args.batch_size, args.repeat, args.runtimes = 16, 8, 1, ["eager"]
    recorded = ["cudagraphs"] if torch.device(args.device).type == "cuda" else []
    args.runtimes = args.runtimes or ["eager", "compiled", *recorded]
    torch.manual_seed(0)
    for part in args.parts:
        rows = [row for name in chosen(PARTS[part][0], args) for row in safe(PARTS[part][1], name, args)]
        if rows and not args.quick:  # a part at a time: what is done stays, whatever comes after
            kind = torch.device(args.device).type
            write_results(f"gpu-{part}" if kind == "cuda" else f"gpu-{part}-{kind}", rows, facts(args))


def safe(rows: Rows, name: str, args: argparse.Namespace) -> list[Row]:
    """Rows of a model; one that says why, if it could not be measured to the end."""
    found: list[Row] = []
    try:
        for one in rows(name, args):
            print(one, flush=True)
            found.append(one)
    except (RuntimeError, StrataViTError) as error:
        if args.quick:
            raise
        print(f"{name}: {error}", flush=True)
        found.append(row(f"stopped: {type(error).__name__}", name, float("nan"), float("nan")))
    empty(args)
    return found


def empty(args: argparse.Namespace) -> None:
    """Gives back what no longer has a name."""
    gc.collect()
    if torch.device(args.device).type == "cuda":
        torch.cuda.empty_cache()


def facts(args: argparse.Namespace) -> str:
    """Device, driver and versions, and how it was measured."""
    device = torch.device(args.device)
    name = platform.processor() or device.type
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        name = f"{torch.cuda.get_device_name(device)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    return (
        f"Device: {name}. Random weights and images; medians of {args.repeat} runs that took turns. Training and "
        f"latency: batches of {args.batch_size}, {args.dtype}. ratio: to a plain forward + backward pass over the same "
        "images, to its peak memory, to the dense step, to the whole conversion, or the speed-up over the ratio of "
        "MACs (1 is ideal). The seconds of contract include making the super-network."
    )


def made(name: str, args: argparse.Namespace) -> nn.Module:
    """A model with random weights, on the CPU: a super-network holds a copy of its source."""
    if args.quick:
        toy = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return timm.create_model("deit_tiny_patch16_224", **toy)
    return timm.create_model(SHAPES[name][0], img_size=224, num_classes=1000)


def network(model: nn.Module, args: argparse.Namespace) -> SuperNet:
    """The super-network of a model, on the device."""
    return SuperNet(model).to(args.device)


def images_of(name: str, args: argparse.Namespace) -> Batches:
    """Calibration batches on the device."""
    count, side = args.images or SHAPES[name][1], 32 if args.quick else 224
    sizes = [min(args.calibration_batch, count - start) for start in range(0, count, args.calibration_batch)]
    drawn = ((torch.randn(size, 3, side, side), torch.randint(0, 1000, (size,))) for size in sizes)
    return [(images.to(args.device), labels.to(args.device)) for images, labels in drawn]


def chosen(names: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    """The models of a part that were asked for."""
    return [name for name in names if name in args.models]


def contract_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """`contract` and `stratify` over a plain pass of the same images."""
    model, batches = made(name, args), images_of(name, args)
    source = copy.deepcopy(model).to(args.device)
    runs: dict[str, Callable[[], object]] = {
        "plain": partial(plain, source, batches),
        "contract": lambda: network(model, args).contract(batches),
        "both": lambda: network(model, args).contract(batches).stratify(batches),
    }
    plain(source, batches[:1])  # warm up
    network(model, args).contract(batches[:1])
    seconds = interleaved(runs, args.repeat, partial(clock, torch.device(args.device)))
    images = sum(len(labels) for _, labels in batches)
    found = {"contract": seconds["contract"], "stratify": seconds["both"] - seconds["contract"]}
    for what, value in found.items():
        yield row(what, f"{name}, {images} images", value, value / seconds["plain"])


def memory_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of `contract` over that of a plain pass, with the sums on the device and on the host."""
    if torch.device(args.device).type != "cuda":
        print("memory: of a CPU, see memory.py")
        return
    model, batches = made(name, args), images_of(name, args)
    base = grown_on_device(lambda: plain(copy.deepcopy(model).to(args.device), batches), args)
    for memory in ("device", "host"):
        peak = grown_on_device(lambda where=memory: network(model, args).contract(batches, memory=where), args)
        yield row(f"peak of contract, memory={memory!r}, MiB", name, peak / 2**20, peak / base)


def grown_on_device(run: Callable[[], object], args: argparse.Namespace) -> int:
    """Largest number of bytes that were allocated while a call ran, weights and images included."""
    empty(args)
    torch.cuda.reset_peak_memory_stats(args.device)
    run()
    return torch.cuda.max_memory_allocated(args.device)


def training_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """A whole training step at half of the MACs over the dense one."""
    device = torch.device(args.device)
    net = in_training(SHAPES[name][0], 32 if args.quick else 224).to(device)
    side = net.data_config["input_size"][-1]
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False):
        half = step_rows(net, (images, labels), args.repeat)[1]
    yield row(f"training step at {half['linear MACs']:.2f} of the MACs", name, half["seconds"], half["time"])


def latency_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Speed-up of small models over the ratio of their MACs, in both kinds of units."""
    seconds = 0.2 if args.quick else 2.0
    settings = [Setting(args.batch_size, runtime, args.dtype, 0, seconds) for runtime in args.runtimes]
    for units in get_args(Units):
        net = network(made(name, args), args)
        net.set_units(units=units)
        models = {"dense": net.extract(spec={}, verbose=False)}
        for n in TWELFTHS:
            models[f"{n}/12"] = net.extract(spec=even(net, n / 12), verbose=False)
        for setting in settings:  # each by itself: rows stay if the next one cannot be run
            for one in bench(models, net.data_config["input_size"], [setting]):
                if one.model != "dense":
                    what = f"latency, {one.model} of the MACs, units {units}, {one.runtime}"
                    yield row(what, name, one.median_ms / 1000, one.speedup / one.ideal)


def conversion_rows(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Seconds of a whole conversion, once, after a small one."""
    device = torch.device(args.device)
    model, batches = made(name, args), images_of(name, args)
    network(model, args).contract(batches[:1])  # warm up
    net = network(model, args)
    start = clock(device)
    net.contract(batches)
    contracted = clock(device)
    net.stratify(batches)
    done = clock(device)
    images = sum(len(labels) for _, labels in batches)
    for what, value in {"contract": contracted - start, "stratify": done - contracted, "both": done - start}.items():
        yield row(f"{what}, seconds", f"{name}, {images} images", value, value / (done - start))


def row(what: str, model: str, value: float, ratio: float) -> Row:
    return {"what": what, "model": model, "measured": value, "ratio": ratio}


Rows = Callable[[str, argparse.Namespace], Iterator[Row]]
PARTS: dict[str, tuple[tuple[str, ...], Rows]] = {
    "contract": (RATIOS, contract_rows),
    "memory": (RATIOS, memory_rows),
    "training": (STEPS, training_rows),
    "latency": (SLICES, latency_rows),
    "conversion": (tuple(SHAPES), conversion_rows),
}

if __name__ == "__main__":
    main()
