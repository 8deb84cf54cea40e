"""What StrataViT costs on a GPU, and what its small models gain there: all figures of one device by one command.

    python benchmarks/gpu.py [--device cuda] [--parts contract memory training latency conversion] [--models DeiT-Ti]
    python benchmarks/gpu.py --device cpu --quick

Weights and images are random: no figure depends on the numbers. Two tables: ratios, each of medians of runs that took
turns with what they are compared with; and the seconds of whole conversions. `--quick` runs every part on a toy, to see
that it works; its tables are printed, not kept. Extraction on a CPU: `conversion_cost.py --extraction`; networks that
merge tokens: `latency.py --models tokens --device cuda`; loaders: `piad_cost.py --loader --device cuda`.
"""

from __future__ import annotations

import argparse
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
BATCH, PASS = 256, 50  # images of a training step and of a timed pass; of a calibration batch


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--images", type=int, help="of a calibration, in place of the default of each model")
    arguments.add_argument("--batch-size", type=int, default=BATCH, help="of training and latency")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the same")
    arguments.add_argument("--runtimes", nargs="+", default=["eager", "compiled"])
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--quick", action="store_true", help="a toy in place of every model")
    args = arguments.parse_args()
    if args.quick:
        args.images, args.batch_size, args.repeat, args.runtimes = 16, 8, 1, ["eager"]
    torch.manual_seed(0)
    tables: dict[str, list[Row]] = {"ratios": [], "conversion": []}
    for part in args.parts:
        for row in PARTS[part](args):
            print(row, flush=True)
            tables["conversion" if part == "conversion" else "ratios"].append(row)
    for name, rows in tables.items():
        if rows and not args.quick:
            kind = torch.device(args.device).type
            write_results(f"gpu-{name}" if kind == "cuda" else f"gpu-{name}-{kind}", rows, facts(args))


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
        "images, to its peak memory, to the dense step, or the speed-up over the ratio of MACs (1 is ideal)."
    )


def made(name: str, args: argparse.Namespace) -> nn.Module:
    """A model with random weights on the device."""
    if args.quick:
        toy = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return timm.create_model("deit_tiny_patch16_224", **toy).to(args.device)
    return timm.create_model(SHAPES[name][0], img_size=224, num_classes=1000).to(args.device)


def images_of(name: str, args: argparse.Namespace) -> Batches:
    """Calibration batches on the device."""
    count, side = args.images or SHAPES[name][1], 32 if args.quick else 224
    starts = range(0, count, PASS)
    sizes = [min(PASS, count - start) for start in starts]
    made = ((torch.randn(size, 3, side, side), torch.randint(0, 1000, (size,))) for size in sizes)
    return [(images.to(args.device), labels.to(args.device)) for images, labels in made]


def chosen(names: tuple[str, ...], args: argparse.Namespace) -> list[str]:
    """The models of a part that were asked for."""
    return [name for name in names if name in args.models]


def contract_rows(args: argparse.Namespace) -> Iterator[Row]:
    """`contract` and `stratify` over a plain pass of the same images."""
    for name in chosen(RATIOS, args):
        model, batches = made(name, args), images_of(name, args)
        runs: dict[str, Callable[[], object]] = {
            "plain": partial(plain, model, batches),
            "contract": lambda m=model, b=batches: SuperNet(m).contract(b),
            "both": lambda m=model, b=batches: SuperNet(m).contract(b).stratify(b),
        }
        plain(model, batches[:1])  # warm up
        seconds = interleaved(runs, args.repeat, partial(clock, torch.device(args.device)))
        images = sum(len(labels) for _, labels in batches)
        found = {"contract": seconds["contract"], "stratify": seconds["both"] - seconds["contract"]}
        for what, value in found.items():
            yield row(what, f"{name}, {images} images", value, value / seconds["plain"])


def memory_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of `contract` over that of a plain pass, with the sums on the device and on the host."""
    if torch.device(args.device).type != "cuda":
        print("memory: of a CPU, see memory.py")
        return
    for name in chosen(RATIOS, args):
        model, batches = made(name, args), images_of(name, args)[:2]
        base = grown_on_device(partial(plain, model, batches), args)
        for memory in ("device", "host"):
            peak = grown_on_device(lambda m=model, b=batches, where=memory: SuperNet(m).contract(b, memory=where), args)
            yield row(f"peak of contract, memory={memory!r}, MiB", name, peak / 2**20, peak / base)


def grown_on_device(run: Callable[[], object], args: argparse.Namespace) -> int:
    """Largest number of bytes that were allocated while a call ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(args.device)
    run()
    return torch.cuda.max_memory_allocated(args.device)


def training_rows(args: argparse.Namespace) -> Iterator[Row]:
    """A whole training step at half of the MACs over the dense one."""
    device = torch.device(args.device)
    for name in chosen(STEPS, args):
        net = in_training(SHAPES[name][0], 32 if args.quick else 224).to(device)
        side = net.data_config["input_size"][-1]
        batch = torch.randn(args.batch_size, 3, side, side, device=device), torch.randint(0, 1000, (args.batch_size,))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16", cache_enabled=False):
            half = step_rows(net, (batch[0], batch[1].to(device)), args.repeat)[1]
        what = f"training step at {half['linear MACs']:.2f} of the MACs"
        yield row(what, name, half["seconds"], half["time"])


def latency_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Speed-up of small models over the ratio of their MACs, in both kinds of units."""
    settings = [
        Setting(args.batch_size, runtime, args.dtype, 0, 0.2 if args.quick else 2.0) for runtime in args.runtimes
    ]
    for name in chosen(SLICES, args):
        for units in get_args(Units):
            net = SuperNet(made(name, args))
            net.set_units(units=units)
            models = {"dense": net.extract(spec={}, verbose=False)}
            for n in TWELFTHS:
                models[f"{n}/12"] = net.extract(spec=even(net, n / 12), verbose=False)
            for one in bench(models, net.data_config["input_size"], settings):
                if one.model != "dense":
                    what = f"latency, {one.model} of the MACs, units {units}, {one.runtime}"
                    yield row(what, name, one.median_ms / 1000, one.speedup / one.ideal)


def conversion_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds of whole conversions, once."""
    device = torch.device(args.device)
    for name in chosen(tuple(SHAPES), args):
        model, batches = made(name, args), images_of(name, args)
        start = clock(device)
        net = SuperNet(model).contract(batches)
        contracted = clock(device)
        net.stratify(batches)
        done = clock(device)
        images = sum(len(labels) for _, labels in batches)
        found = {"contract, s": contracted - start, "stratify, s": done - contracted}
        yield {"model": name, "images": images, **found, "both, s": done - start}


def row(what: str, model: str, value: float, ratio: float) -> Row:
    return {"what": what, "model": model, "measured": value, "ratio": ratio}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "contract": contract_rows,
    "memory": memory_rows,
    "training": training_rows,
    "latency": latency_rows,
    "conversion": conversion_rows,
}

if __name__ == "__main__":
    main()
