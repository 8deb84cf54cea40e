"""How long a newcomer takes, from an empty environment to exported small models of DeiT-Tiny: a tour, each step timed.

    python benchmarks/newcomer.py [--images N]

A new virtual environment, `pip install '.[export,train,demo]'` of this checkout, then one small model from a flat
folder of 64 images without labels, in Python and by the command line; every step of README on all images, run from an
empty folder; and what follows: three classes of one's own (digits of scikit-learn), recovery, training, the demo.
`--weights` and `--class-map` stand in for the hub, which need not be reachable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DATA, MODELS, timed, write_results
from PIL import Image
from sklearn.datasets import load_digits

CHECKOUT = Path(__file__).parents[1]
FLAT = 64  # images of the flat folder
ANSWER = 100  # letters of a printed answer that are kept


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, help="to calibrate on; the command's default if not given")
    args = arguments.parse_args()
    architecture, weights = MODELS["deit_tiny"]
    images, classes = str(DATA / "imagenet"), str(DATA / "imagenet" / "class_map.txt")
    few = ["--images", str(args.images)] if args.images else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flat(work / "flat")
        digits(work / "digits")
        program, python = (str(work / "env" / "bin" / name) for name in ("stratavit", "python"))
        labelled = ["--data", images, "--class-map", classes]
        named = [architecture, "--weights", str(DATA / weights)]
        compress = (
            f"import stratavit; model = stratavit.dense_model({architecture!r}, {str(DATA / weights)!r}); "
            "small = stratavit.compress(model, 'flat', macs=0.5); stratavit.save(small, 'flat-compressed')"
        )
        load = (
            "import stratavit, timm; model = timm.create_model('local-dir:flat-compressed', pretrained=True); "
            "print(sum(p.numel() for p in model.parameters()), 'parameters')"
        )
        taught, own = ["--teacher", "run", "--data", images], ["--new-head", "--data", "digits"]
        poor = ["--min-agreement", "80"]  # as may be, from so few images
        steps = {
            "python -m venv": [sys.executable, "-m", "venv", "env"],
            "pip install": [python, "-m", "pip", "install", "--quiet", f"{CHECKOUT}[export,train,demo]"],
            "--help": [program, "--help"],
            f"compress, {FLAT} images": [python, "-c", compress],
            "timm loads it": [python, "-c", load],
            f"convert, {FLAT} images": [program, "convert", *named, "--data", "flat", "--out", "flat-run"],
            "extract from it": [program, "extract", "flat-run", "--macs", "50%", "--out", "flat-small", "--json"],
            "int8 of it": [program, "export", "flat-small", "--int8", "--data", "flat", *poor, "--json"],
            "evaluate the int8 file": [program, "evaluate", "flat-small-int8.onnx", *labelled, "--json"],
            "convert": [program, "convert", *named, *labelled, "--out", "run", *few],
            "extract": [program, "extract", "run", "--macs", "50%", "--out", "small", "--json"],
            "evaluate": [program, "evaluate", "small", *labelled, "--json"],
            "bench": [program, "bench", "small", "--json"],
            "curve": [program, "curve", "run", *labelled],
            "report": [program, "report", "run"],
            "extract --max-drop": [program, "extract", "run", "--max-drop", "8", *labelled, "--out", "fast", "--json"],
            "extract --latency 80%": [program, "extract", "run", "--latency", "80%", "--out", "timed", "--json"],
            "predict": [program, "predict", "fast", str(next(iter((work / "flat").iterdir())))],
            "export": [program, "export", "fast", "--json"],
            "int8": [program, "export", "fast", "--int8", "--data", images, "--json"],
            "evaluate the int8 file ": [program, "evaluate", "fast-int8.onnx", *labelled, "--json"],
            "recover, 10 steps": [program, "recover", "small", *taught, "--steps", "10", "--out", "better", "--json"],
            "finetune --new-head": [program, "finetune", "small", *own, "--epochs", "5", "--out", "tuned", "--json"],
            "predict by it": [program, "predict", "tuned", str(next((work / "digits" / "val" / "two").iterdir()))],
            "export it": [program, "export", "tuned", "--json"],
            "train, 1 epoch": [program, "train", "run", *labelled, "--epochs", "1", "--out", "trained", "--json"],
            "demo": [program, "demo", "--out", "demo"],
        }  # fmt: skip
        for name, command in steps.items():
            answer: list[str] = []
            rows.append({"step": name, "seconds": timed(lambda c=command, a=answer: a.append(output(c, work)))})
            rows[-1]["answer"] = told(answer[0]) if "--json" in command else first_words(answer[0])
            print(rows[-1], flush=True)
    total = sum(float(row["seconds"]) for row in rows)
    rows.append({"step": "all", "seconds": total, "answer": f"{total / 60:.1f} minutes"})
    note = "Seconds on this machine; pip's cache and mirror, and the number of threads, weigh most. " + (
        f"Calibrated on {args.images} images." if args.images else "Calibrated as `convert` does by itself."
    )
    write_results("newcomer", rows, note)


def flat(folder: Path) -> None:
    """A folder of photographs without labels, in no other folders."""
    folder.mkdir()
    paths = sorted((DATA / "imagenet" / "train").glob("*/*"))
    for number, path in enumerate(paths[:: len(paths) // FLAT][:FLAT]):
        shutil.copy(path, folder / f"{number:02}{path.suffix}")


def digits(folder: Path) -> None:
    """Hand-written digits in three classes: 30 of each to learn from, 20 to try."""
    found = load_digits()
    for label, name in enumerate(("zero", "one", "two")):
        pictures = found.images[found.target == label]
        for split, some in (("train", pictures[:30]), ("val", pictures[30:50])):
            (folder / split / name).mkdir(parents=True)
            for number, pixels in enumerate(some):
                picture = Image.fromarray((pixels * 15).astype("uint8")).resize((64, 64)).convert("RGB")
                picture.save(folder / split / name / f"{number:02}.png")


def output(command: list[str], folder: Path) -> str:
    """What a command prints, run in `folder` without this environment's settings for Python.

    Raises:
        subprocess.CalledProcessError: if it failed.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=folder, env=clean, check=True, stdout=subprocess.PIPE, text=True).stdout


def first_words(answer: str) -> str:
    """The beginning of what a command printed, in one cell."""
    return " ".join(answer.replace("|", "/").split())[:ANSWER]


def told(answer: str) -> str:
    """The numbers of a command's JSON, in one cell."""
    numbers = json.loads(answer)
    return ", ".join(f"{key} {value:g}" for key, value in numbers.items() if isinstance(value, int | float))


if __name__ == "__main__":
    main()
