"""Throughput of PIAD and of calibration against processes and threads, on CPUs; and a check of the cost model.

    pip install '.[train]'
    python benchmarks/scale.py [--images 96]

PIAD: DeiT-Tiny at 224 pixels under `torch.distributed.run`, one thread for each process, 8 images for each, random
weights and images. Start-up and measurements before the first step are taken off by training twice, on `images` and on
three times as many. Calibration runs in one process (a conversion takes minutes): with one thread and with two. The
cost model (`cost_model.py`) predicts every row from the dense training step measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cost_model
import timm
import torch
from common import plain, timed, write_results
from piad_cost import in_training
from torch.utils.data import TensorDataset

from stratavit import Recipe, SuperNet, train_piad

BATCH, MODEL = 8, "deit_tiny_patch16_224"
Row = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=96)
    arguments.add_argument("--worker", choices=("piad", "calibration", "plain"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.worker:
        work(args.worker, args.images)
        return
    rows: list[Row] = []
    dense = rate("plain", 1, 1, args.images)
    rows.append(row("dense forward + backward", 1, 1, dense, dense, 1.0))
    piad = [rate("piad", processes, 1, args.images) for processes in (1, 2)]
    predicted = dense / cost_model.piad_factor(cost_model.EPOCH)
    rows += [row("PIAD", n, 1, found, piad[0], n * predicted) for n, found in zip((1, 2), piad, strict=True)]
    calibrated = [rate("calibration", 1, threads, args.images) for threads in (1, 2)]
    predicted = dense / cost_model.CONTRACT
    for threads, found in zip((1, 2), calibrated, strict=True):
        rows.append(row("calibration (contract)", 1, threads, found, calibrated[0], threads * predicted))
    note = (
        f"DeiT-Tiny, 224 pixels, {BATCH} images a process and step, one epoch of PIAD along a given list. `scaling`: "
        "throughput over that of one. `predicted`: by the cost model from the dense row, for perfect scaling."
    )
    write_results("scale", rows, note)


def row(what: str, processes: int, threads: int, found: float, one: float, predicted: float) -> Row:
    made = {"what": what, "processes": processes, "threads of each": threads, "images/s": found, "scaling": found / one}
    if what.startswith("dense"):
        predicted = found
    made |= {"predicted images/s": predicted, "measured / predicted": found / predicted}
    print(made, flush=True)
    return made


def rate(what: str, processes: int, threads: int, images: int) -> float:
    """Images a second, without what does not depend on their number."""
    script = [str(Path(__file__).resolve()), "--worker", what]
    launch = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29537"]
    seconds = []
    for count in (images, 3 * images):
        command = ["env", f"OMP_NUM_THREADS={threads}", *launch, *script, "--images", str(count * processes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
        seconds.append(max(float(line.split()[1]) for line in told))
    return 2 * images * processes / (seconds[1] - seconds[0])


def work(what: str, images: int) -> None:
    """Does it once, in this process, and prints the seconds."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(images, 3, 224, 224), torch.randint(0, 1000, (images,)))
    batches = [data[i : i + BATCH] for i in range(0, images, BATCH)]
    if what == "plain":
        model = timm.create_model(MODEL).train()
        plain(model, batches[:2])
        seconds = timed(lambda: plain(model, batches))
    elif what == "calibration":
        net = SuperNet(timm.create_model(MODEL))
        seconds = timed(lambda: net.contract(batches))
    else:
        net = in_training()
        seconds = timed(lambda: train(net, data))
    with contextlib.suppress(OSError):
        print("seconds", seconds, flush=True)
    time.sleep(1)


def train(net: SuperNet, data: TensorDataset) -> None:
    """One epoch along the list that is there; nothing is evaluated."""
    proxy = [data[:BATCH]]
    changes = {"epochs": 1, "list_epochs": 1, "list_source": "given", "batch_size": BATCH, "repeats": 1, "workers": 0}
    recipe = Recipe(**changes, tracker="none", proxy_images=BATCH, mixup=0.0, cutmix=0.0, ema_decay=0.9999)
    train_piad(net, data, config=recipe, proxy=proxy, cpu=True)


if __name__ == "__main__":
    main()
