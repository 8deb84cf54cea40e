"""Several sizes served by one super-network: memory and latency next to three small models. DeiT-Tiny.

    python benchmarks/serving.py [--axes both] [--requests 200] [--clients 1 2 4 8 16]

Runs the app of docs/serving.md (`serving_app.py`) in this process, without a network in between. Each of so many
clients sends its next photograph when it has its reply. Every request at one size, or at the size that the app chooses
by load; ways take turns. Memory is that of fresh processes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2
import torch
from common import DATA, WORK, converted, peak, resident, write_results
from serving_app import make_app
from torch import Tensor, nn

import stratavit
from stratavit.elastic.memory import size_of
from stratavit.utils.freed_memory import give_back

SIZES = {"12/12": 1.0, "8/12": 8 / 12, "6/12": 6 / 12}
ONE, THREE = "one super-network", "three small models"
BY_LOAD = "by load"


class SmallModels(nn.Module):
    """Small models behind the interface of a super-network; in place of a spec stands the name of a size."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, images: Tensor, spec: str) -> Tensor:
        """Logits of the model of a size."""
        return self.models[spec](images)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--axes", choices=("width", "both"), default="width", help="list that sizes are taken from")
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--requests", type=int, default=200, help="of each row (default: %(default)s)")
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="that wait for replies")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the app (default: all cores)")
    arguments.add_argument("--rounds", type=int, default=4, help="in which ways take turns (default: %(default)s)")
    arguments.add_argument("--way", choices=(ONE, THREE), help="print bytes; used by the script itself")
    args = arguments.parse_args()
    folder = args.work / ("deit_tiny-width-tokens" if args.axes == "both" else "deit_tiny")
    if args.way:
        print(*memory(folder, args.way, args.axes))
        return
    prepare(folder, args.axes)
    rows = memory_rows(args)
    torch.set_num_threads(1)  # requests run next to one another
    nets = {ONE: super_network(folder, args.axes), THREE: small_models(folder, args.axes)}
    apps = {way: make_app(net, sizes, args.threads, 1000) for way, (net, sizes) in nets.items()}
    load = measure(apps, args.clients, args.requests, args.rounds)
    cores = f"{args.threads} threads of one torch thread each, {os.cpu_count()} cores; DeiT-Tiny, float32, 224 pixels."
    write_results(f"serving-memory-{args.axes}", rows, MEMORY_NOTE + cores)
    write_results(f"serving-{args.axes}", load, LOAD_NOTE + cores)


MEMORY_NOTE = (
    "Sizes 12/12, 8/12 and 6/12 of the linear MACs. Tensors: counted. Resident: growth of a fresh process from before "
    "loading to after each size has served one image; peak: largest on the way, when second moments are still there; "
    "trimmed: after `malloc_trim(0)`, which gives pages that were freed back to the system. "
)
LOAD_NOTE = (
    "Milliseconds from request to reply, JPEG decoding included, no network. `replied at`: replies by size. A client "
    "sends its next request when it has its reply. "
)


def prepare(folder: Path, axes: str) -> None:
    """Makes the super-network and, beside it, the three small models, unless they are there."""
    net = converted("deit_tiny", folder.parent, **({"axes": ("width", "tokens")} if axes == "both" else {}))
    for name, share in SIZES.items():
        if not small_folder(folder, name).exists():
            small = net.extract(macs=share, axes=axes, verbose=False)
            stratavit.save(small, small_folder(folder, name))


def small_folder(folder: Path, size: str) -> Path:
    """Where a small model is kept."""
    return folder.with_name(f"{folder.name}-small-{size.partition('/')[0]}")


def super_network(folder: Path, axes: str) -> tuple[nn.Module, dict[str, Any]]:
    """The super-network, specialised, and its sizes."""
    net = stratavit.SuperNet.load(folder)
    sizes = {name: net.spec(macs=share, axes=axes) for name, share in SIZES.items()}
    net.specialise(*sizes.values())
    return net, sizes


def small_models(folder: Path, axes: str) -> tuple[nn.Module, dict[str, Any]]:
    """The small models and their sizes."""
    net = SmallModels({name: stratavit.load(small_folder(folder, name)) for name in SIZES})
    net.data_config = net.models["12/12"].data_config
    return net, {name: name for name in SIZES}


@torch.inference_mode()
def memory(folder: Path, way: str, axes: str) -> tuple[int, ...]:
    """Bytes of tensors; growth of resident memory at its peak, when every size has served, and without freed pages."""
    image = torch.randn(1, 3, 224, 224)
    nn.Linear(8, 8)(torch.randn(2, 8))
    before = resident()
    net, sizes = super_network(folder, axes) if way == ONE else small_models(folder, axes)
    gc.collect()
    for spec in sizes.values():
        net(image, spec)
    held = net.memory().total if way == ONE else size_of(net.state_dict().values())
    grown = [1024 * peak() - before, resident() - before]
    give_back()
    return held, *grown, resident() - before


def memory_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, each measured in a process of its own."""
    rows = []
    for way in (ONE, THREE):
        command = [sys.executable, __file__, "--work", str(args.work), "--axes", args.axes, "--way", way]
        columns = ("tensors MB", "peak MB", "resident MB", "resident, trimmed MB")
        found = subprocess.check_output(command, text=True).split()
        rows.append({"served by": way} | {name: int(n) / 1e6 for name, n in zip(columns, found, strict=True)})
    return rows


def measure(apps: Mapping[str, Any], clients: Sequence[int], requests: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each number of clients, network and size."""
    images = photographs()
    rows = []
    for count in clients:
        ways = [(way, size) for size in (*SIZES, BY_LOAD) for way in apps]
        found: dict[tuple[str, str], list[tuple[float, str]]] = {key: [] for key in ways}
        seconds: Counter[tuple[str, str]] = Counter()
        for _ in range(rounds):
            for way, size in ways:
                start = time.perf_counter()
                found[way, size] += asyncio.run(ask(apps[way], size, images, count, max(1, requests // rounds)))
                seconds[way, size] += time.perf_counter() - start
        for (way, size), replies in found.items():
            times = torch.tensor([1000 * duration for duration, _ in replies])
            replied = Counter(name for _, name in replies)
            rows.append(
                {
                    "clients": count,
                    "served by": way,
                    "size": size,
                    "p50 ms": float(times.quantile(0.5)),
                    "p95 ms": float(times.quantile(0.95)),
                    "images/s": len(replies) / seconds[way, size],
                    "replied at": ", ".join(f"{name}: {replied[name]}" for name in SIZES if replied[name]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def photographs() -> Iterator[bytes]:
    """JPEG files of the validation images, one after another, without end."""
    paths = sorted((DATA / "imagenet" / "val").glob("*/*"))
    if not paths:
        raise SystemExit(f"no images under {DATA}/imagenet/val: benchmarks/README.md says what STRATAVIT_DATA holds")
    return cycle([path.read_bytes() for path in paths[:: max(1, len(paths) // 64)]])


async def ask(app: Any, size: str, images: Iterator[bytes], clients: int, requests: int) -> list[tuple[float, str]]:
    """Seconds of each request, and the size of its reply."""
    queue = iter(list(islice(images, requests)))
    replies: list[tuple[float, str]] = []
    params = {} if size == BY_LOAD else {"size": size}
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://app", timeout=600) as client:

        async def run() -> None:
            for image in queue:
                start = time.perf_counter()
                reply = await client.post("/classify", content=image, params=params)
                reply.raise_for_status()
                replies.append((time.perf_counter() - start, reply.json()["size"]))

        await asyncio.gather(*(run() for _ in range(clients)))
    return replies


if __name__ == "__main__":
    main()
