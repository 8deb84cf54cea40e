"""What a training step of PIAD costs: time against MACs along a dropout list, DeiT-Tiny at 224 pixels.

    python benchmarks/piad_cost.py [--batch 64] [--repeat 5]
    python benchmarks/piad_cost.py --device cuda --dtype bf16 --batch 256 --compile-sizes 8 --cuda-graphs
    python benchmarks/piad_cost.py --loader --device cuda --workers 16 [--images 2048]

Forward + backward of a prefix against the full network's next to it, both in training mode with means for what is cut
(the default method). The list cuts every site in the same ratio, none as a whole, and ends where the paper's does, at
1.5/12 of the MACs. Weights and images are random: the time does not depend on them. On a GPU the clock is read when the
device has done all that was queued.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import write_results
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from stratavit import Recipe, SuperNet
from stratavit.calibration import contraction
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.allocation import State, allocate, ordered_list
from stratavit.dropout_list.strata import Strata
from stratavit.spec import Spec
from stratavit.tasks.sampling import prefixes_of, rounded
from stratavit.training.augmentation import TrainingFolder, training_transform
from stratavit.training.compiling import CompiledSizes
from stratavit.training.device_augmentation import DeviceAugmentation
from stratavit.training.optimizer import optimiser_and_schedule
from stratavit.training.order import loader, make_order

MODEL = "deit_tiny_patch16_224"
SHARES = (*(1 - step / 15 for step in range(1, 11)), 2 / 12, 1.5 / 12)  # ten from 14/15 down to 4/12, and two below
HALF, TARGET, TARGET_FROM = 6 / 12, 1.15, 4 / 12


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--model", default=MODEL, help="timm's name of a ViT")
    arguments.add_argument("--size", type=int, default=224, help="pixels of a side")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="bf16: mixed precision")
    arguments.add_argument("--compile-sizes", type=int, default=0, help="add rows of so many compiled sizes")
    arguments.add_argument("--cuda-graphs", action="store_true", help="the same once more, recorded as CUDA graphs")
    arguments.add_argument("--loader", action="store_true", help="images per second with both kinds of augmentation")
    arguments.add_argument("--workers", type=int, default=4)
    arguments.add_argument("--images", type=int, default=2048, help="of --loader")
    args = arguments.parse_args()
    torch.manual_seed(0)
    if args.loader:
        loader_rows(args)
        return
    device = torch.device(args.device)
    net = in_training(args.model, args.size).to(device)
    batch = (
        torch.randn(args.batch, 3, args.size, args.size).to(device),
        torch.randint(0, 1000, (args.batch,)).to(device),
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16", cache_enabled=False):
        measure(net, batch, args)


def measure(net: SuperNet, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """All rows, written."""
    specs = [net.spec(macs=share) for share in SHARES]
    rows = prefix_rows(net, batch, specs, args.repeat)
    worst = max(row["time / linear MACs"] for spec, row in zip(specs, rows, strict=True) if asked_for(net, spec))
    rows.append(epoch_row(net, specs, [row["time"] for row in rows]))
    rows += step_rows(net, batch, args.repeat)
    if args.compile_sizes:
        rows += compiled_rows(net, batch, args.compile_sizes, args.repeat)
        if args.cuda_graphs:
            rows += compiled_rows(net, batch, args.compile_sizes, args.repeat, "reduce-overhead")
    note = (
        f"{args.model}, {args.size} pixels, {hardware(batch[0].device)}, {args.dtype}. "
        f"Batches of {args.batch}; medians of {args.repeat} pairs, each run next to its dense partner; `time` is the "
        "ratio to that partner, MACs are shares of the dense model's. Largest time / linear MACs from 4/12 up: "
        f"{worst:.3f} (target: at most {TARGET}). A PIAD epoch: mean over all {len(net.strata) + 1} positions of the "
        "list, time interpolated between the prefixes; optimiser, averaging, and measuring list and means are not in "
        "it. A whole step: forward, backward, AdamW, averaged weights."
    )
    write_results("piad-cost" if args.device == "cpu" else f"piad-cost-{args.model.split('_patch')[0]}-gpu", rows, note)


def loader_rows(args: argparse.Namespace) -> None:
    """Images per second that reach the device, augmented: photographs' size (500 x 375), JPEG, random content."""
    config = {"input_size": (3, args.size, args.size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875}
    config["interpolation"] = "bicubic"
    device, rows = torch.device(args.device), []
    with TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "train" / "class", args.images)
        for where, randaugment in (("workers", ""), ("device", ""), ("workers", "rand-m9-mstd0.5-inc1")):
            keys = {"augment_on": where, "randaugment": randaugment, "batch_size": args.batch, "repeats": 1}
            recipe = Recipe(**keys, workers=args.workers)
            proxy = image_loader(folder, config, "train", None)
            data = TrainingFolder(proxy.dataset, training_transform(config, recipe))
            augment = DeviceAugmentation(config, recipe, device) if where == "device" else None
            seconds = [pass_over(data, recipe, augment, device) for _ in range(args.repeat)]
            count = args.images // args.batch * args.batch
            found = {"augmentation": where, "RandAugment": randaugment or "none"}
            rows.append({**found, "images per second": count / statistics.median(seconds)})
    note = (
        f"{args.images} images, {args.workers} workers, batches of {args.batch}, {hardware(device)}; median of passes."
    )
    write_results("piad-loader" if args.device == "cpu" else "piad-loader-gpu", rows, note)


def write_photographs(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def pass_over(data: TrainingFolder, recipe: Recipe, augment: Any, device: torch.device) -> float:
    """Seconds of one epoch of a trainer's loader, its start left out."""
    order = make_order(data, recipe, 1)
    batches = iter(loader(data, order, 0, 0, 0, recipe.workers, device.type == "cuda"))
    start = 0.0
    for number, batch in enumerate(batches):
        images = (batch if augment is None else augment(batch))[0].to(device, non_blocking=True)
        if number == 0:
            start = clock(device)
    assert len(images)
    return (clock(device) - start) * order.steps / max(order.steps - 1, 1)


def hardware(device: torch.device) -> str:
    """Name of a GPU; that of a CPU is among the facts of every result."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def in_training(model: str = MODEL, size: int = 224) -> SuperNet:
    """A model as the default method trains it, with a list that cuts every site in the same ratio."""
    net = SuperNet(timm.create_model(model, img_size=size))
    for module in net.elastic.values():
        contraction.set_mean(module, torch.zeros(module.heads, module.full_width))
    net.compensation = "mean"
    ratios = {site.name: 0.0 for site in net.sites}
    states = [State(1.0, net.resolve(None))]
    for share in (*(n / 12 for n in range(11, 1, -1)), SHARES[-1]):
        states.append(State(share, allocate(net.cost, ratios, share, states[-1].widths)))
    entries = ordered_list(net.sites, states, ratios)
    whole = Strata(net.sites, entries)
    end = next(p for p in range(len(whole)) if net.macs(whole.spec(p)) <= SHARES[-1] * net.macs())
    net.strata = Strata(net.sites, entries[:end])
    return net.train()


def shares(net: SuperNet, spec: Spec) -> tuple[float, float]:
    """Share of the dense MACs: linear, and with the products of attention counted."""
    return net.macs(spec) / net.macs(), net.macs(spec, attention=True) / net.macs(attention=True)


def asked_for(net: SuperNet, spec: Spec) -> bool:
    """Whether the target holds for a prefix; a budget is missed by less than one unit."""
    return shares(net, spec)[0] > TARGET_FROM - 0.01


def row(what: str, linear: float, attention: float, seconds: float | str, ratio: float) -> dict[str, Any]:
    return {
        "what": what,
        "linear MACs": linear,
        "MACs with attention": attention,
        "seconds": seconds,
        "time": ratio,
        "time / linear MACs": ratio / linear,
    }


def prefix_rows(net: SuperNet, batch: tuple[Tensor, Tensor], specs: list[Spec], repeat: int) -> list[dict[str, Any]]:
    """Forward + backward of every prefix."""
    full = net.resolve(None)
    for spec in (full, specs[-1]):
        passes(net, batch, spec)  # warm up
    found: list[list[tuple[float, float]]] = [[] for _ in specs]
    for turn in range(repeat):
        for spec, pairs in zip(specs, found, strict=True):
            pairs.append(pair(lambda which: passes(net, batch, which), full, spec, turn))
    return [
        row("forward + backward", *shares(net, spec), statistics.median(p for _, p in pairs), median_ratio(pairs))
        for spec, pairs in zip(specs, found, strict=True)
    ]


def pair(run: Callable[[Spec], float], full: Spec, spec: Spec, turn: int) -> tuple[float, float]:
    """Seconds of the dense network and of a prefix right after each other; who is first changes every turn."""
    if turn % 2:
        prefix, dense = run(spec), run(full)
    else:
        dense, prefix = run(full), run(spec)
    return dense, prefix


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(prefix / dense for dense, prefix in pairs)


def passes(net: nn.Module, batch: tuple[Tensor, Tensor], spec: Spec) -> float:
    """Seconds of forward + backward; gradients are zeroed outside the timing."""
    net.zero_grad(set_to_none=True)
    start = clock(batch[0].device)
    F.cross_entropy(net(batch[0], spec), batch[1]).backward()
    return clock(batch[0].device) - start


def clock(device: torch.device) -> float:
    """Seconds, when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compiled_rows(
    net: SuperNet, batch: tuple[Tensor, Tensor], count: int, repeat: int, mode: str | None = None
) -> list[dict[str, Any]]:
    """Forward + backward of the sizes that a recipe with `compile_sizes` runs, against the compiled dense network."""
    assert net.strata is not None
    prefixes = prefixes_of(net.strata, net.cost, whole_groups=False)
    dropped = float(prefixes[0].macs - prefixes[-1].macs)
    specs = list(dict.fromkeys(one.spec for one in rounded(prefixes, count, dropped, complete=True)))
    compiled, how = CompiledSizes(net, mode), "compiled" if mode is None else f"compiled ({mode})"
    for spec in specs:
        for _ in range(3):  # compiles, and warms up
            passes(compiled, batch, spec)
    found: list[list[tuple[float, float]]] = [[] for _ in specs]
    eager: list[float] = []
    for turn in range(repeat):
        eager.append(passes(net, batch, specs[0]))
        for spec, pairs in zip(specs, found, strict=True):
            pairs.append(pair(lambda which: passes(compiled, batch, which), specs[0], spec, turn))
    dense = statistics.median(dense for dense, _ in found[0])
    return [
        row(f"dense, {how}, over eager", 1.0, 1.0, dense, dense / statistics.median(eager)),
        *(
            row(
                f"{how}, over dense {how}",
                *shares(net, s),
                statistics.median(p for _, p in pairs),
                median_ratio(pairs),
            )
            for s, pairs in zip(specs[1:], found[1:], strict=True)
        ),
    ]


def epoch_row(net: SuperNet, specs: list[Spec], ratios: list[float]) -> dict[str, Any]:
    """Forward + backward of an epoch of PIAD over those of a dense one: every position of the list as often."""
    assert net.strata is not None
    places = [shares(net, net.strata.spec(position)) for position in range(len(net.strata) + 1)]
    linear, attention = (float(values) for values in np.mean(places, axis=0))
    known = sorted([*zip((shares(net, spec)[0] for spec in specs), ratios, strict=True), (1.0, 1.0)])
    times = np.interp([place for place, _ in places], *zip(*known, strict=True))
    return row("a PIAD epoch over a dense one", linear, attention, "", float(times.mean()))


def step_rows(net: SuperNet, batch: tuple[Tensor, Tensor], repeat: int) -> list[dict[str, Any]]:
    """The whole step, dense and at half the MACs."""
    full, half, recipe = net.resolve(None), net.spec(macs=HALF), Recipe()
    optimiser, schedule = optimiser_and_schedule(net.model, recipe, len(batch[0]), 1000)
    average = ModelEmaV3(net, recipe.ema_decay)

    def step(spec: Spec) -> float:
        start = clock(batch[0].device)
        schedule.step_update(0)
        F.cross_entropy(net(batch[0], spec), batch[1]).backward()
        optimiser.step()
        optimiser.zero_grad()
        average.update(net)
        return clock(batch[0].device) - start

    net.zero_grad(set_to_none=True)
    step(full)  # warm up: the first step makes the moments of AdamW
    pairs = [pair(step, full, half, turn) for turn in range(repeat)]
    dense, prefix = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return [
        row("whole step, dense", 1.0, 1.0, dense, 1.0),
        row("whole step, 6/12", *shares(net, half), prefix, median_ratio(pairs)),
    ]


if __name__ == "__main__":
    main()
