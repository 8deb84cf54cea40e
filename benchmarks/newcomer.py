"""How long a newcomer takes, from an empty environment to a half-size DeiT-Tiny: the README's steps, each timed.

    python benchmarks/newcomer.py [--images N]

A new virtual environment, `pip install .` of this checkout, then `convert`, `extract --macs 50%`, `evaluate` and
`bench`, run from an empty folder. `--weights` and `--class-map` stand in for the hub, which need not be reachable.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DATA, MODELS, timed, write_results

CHECKOUT = Path(__file__).parents[1]


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
        program = str(work / "env" / "bin" / "stratavit")
        steps = {
            "python -m venv": [sys.executable, "-m", "venv", "env"],
            "pip install": [str(work / "env" / "bin" / "python"), "-m", "pip", "install", "--quiet", str(CHECKOUT)],
            "convert": [program, "convert", architecture, "--weights", str(DATA / weights), "--data", images,
                        "--class-map", classes, "--out", "run", *few],
            "extract": [program, "extract", "run", "--macs", "50%", "--out", "small"],
            "evaluate": [program, "evaluate", "small", "--data", images, "--class-map", classes, "--json"],
            "bench": [program, "bench", "small", "--json"],
        }  # fmt: skip
        for name, command in steps.items():
            answer: list[str] = []
            rows.append({"step": name, "seconds": timed(lambda c=command, a=answer: a.append(output(c, work)))})
            rows[-1]["answer"] = told(answer[0]) if "--json" in command else ""
            print(rows[-1], flush=True)
    total = sum(float(row["seconds"]) for row in rows)
    rows.append({"step": "all", "seconds": total, "answer": f"{total / 60:.1f} minutes"})
    note = "Seconds on this machine; pip's cache and mirror, and the number of threads, weigh most. " + (
        f"Calibrated on {args.images} images." if args.images else "Calibrated as `convert` does by itself."
    )
    write_results("newcomer", rows, note)


def output(command: list[str], folder: Path) -> str:
    """What a command prints, run in `folder` without this environment's settings for Python.

    Raises:
        subprocess.CalledProcessError: if it failed.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=folder, env=clean, check=True, stdout=subprocess.PIPE, text=True).stdout


def told(answer: str) -> str:
    """The numbers of a command's JSON, in one cell."""
    numbers = json.loads(answer)
    return ", ".join(f"{key} {value:g}" for key, value in numbers.items() if isinstance(value, int | float))


if __name__ == "__main__":
    main()
