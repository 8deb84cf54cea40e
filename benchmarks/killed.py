"""Training killed by SIGKILL at random moments and resumed: are its results those of a run that was left alone?

    python benchmarks/killed.py [--kills 20] [--seed 0]

PIAD on scikit-learn's digits by `recipes/digits.toml`, shortened, with drop-path and mixup, so that their random
numbers must come back too; the state is saved every three steps. Every kill draws what it aims at: the start of the
process, any moment of the training, or a part of it that a moment would seldom hit. A run that ends before the last
kill is compared, and another one begun. Everything is compared bit for bit; a difference is an error.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ablation_digits import RECIPE
from common import write_results
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import Recipe, SuperNet
from stratavit.artifacts.folder_format import JSON_FILE, MOMENTS_FILE, WEIGHTS_FILE
from stratavit.tasks import demo
from stratavit.tasks.piad_task import PiadTask
from stratavit.training import run_files
from stratavit.training.order import Seeded

CHANGES = {"epochs": 6, "list_epochs": 3, "save_steps": 3, "eval_every": 2, "drop_path": 0.1, "mixup": 0.8}
START, PHASE, ERRORS = "start", "phase", "errors.txt"  # beside the folder of a run
STARTING, LIST, IMAGES, SAVE = "start-up", "means and list", "loading images", "save of the state"
EVALUATION, MEANS, FILES, REST = "evaluation", "final means", "final files", "steps and the rest"
PHASES = {
    (PiadTask, "begin_stage"): LIST,
    (Seeded, "__getitem__"): IMAGES,
    (torch, "save"): SAVE,
    (os, "fsync"): SAVE,
    (PiadTask, "evaluate"): EVALUATION,
    (PiadTask, "graduate"): MEANS,
    (SuperNet, "save"): FILES,
}
AIMS = (STARTING, REST, REST, LIST, SAVE, EVALUATION, FILES)  # REST: any moment of the training
COMPARED_STATE = ("weights", "ema", "means", "optimiser", "strata")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    if args.child is not None:
        train(args.child, args.resume)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        super_network().save(work / START)
        tally = Tally(args.kills, random.Random(args.seed), *left_alone(work / "whole"))
        expected = outcome(work / "whole")
        identical = dict.fromkeys(expected, True)
        while tally.runs == 0 or tally.kills < args.kills:
            folder = work / f"run-{tally.runs}"
            interrupted(folder, tally)
            found = outcome(folder)
            identical = {what: identical[what] and same(found[what], expected[what]) for what in expected}
            shutil.rmtree(folder)
            print(f"run {tally.runs}: {tally.kills} kills so far, all identical: {all(identical.values())}", flush=True)
    rows = tally.rows() + [{"what": f"identical: {what}", "value": yes_no(value)} for what, value in identical.items()]
    note = (
        f"Moments drawn with seed {args.seed}; a run left alone took {tally.startup:.0f} s to start and "
        f"{tally.training:.0f} s to train. A kill rolls the run back to its last state; a run killed before its first "
        "is begun anew. Identical: bit for bit to the run left alone, for every run."
    )
    write_results("killed", rows, note)
    if not all(identical.values()):
        sys.exit("killed: a resumed run differs from the one left alone")


@dataclass
class Tally:
    """The kills that are due, and those that were made.

    Attributes:
        due: Kills to make.
        generator: Draws their moments.
        startup, training: Seconds of a run that was left alone.
        runs: Runs finished.
        resumed, anew: Starts after a kill, from a state or without one.
        steps: Step of the state at every kill that found one.
        phases: What the run was doing.
    """

    due: int
    generator: random.Random
    startup: float
    training: float
    runs: int = 0
    resumed: int = 0
    anew: int = 0
    steps: list[int] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)

    @property
    def kills(self) -> int:
        """Kills that hit a living process."""
        return self.phases.total()

    def rows(self) -> list[dict[str, Any]]:
        """The table without the comparison."""
        values = {
            "kills": self.kills,
            **{f"of these during: {phase}": self.phases[phase] for phase in (STARTING, *PHASES.values(), REST)},
            "runs finished": self.runs,
            "resumed from a state": self.resumed,
            "begun anew, no state yet": self.anew,
            "step of the state at a kill, smallest": min(self.steps, default="none"),
            "step of the state at a kill, largest": max(self.steps, default="none"),
            "step of the state at a kill, distinct": len(set(self.steps)),
        }
        return [{"what": what, "value": value} for what, value in values.items()]


# ---- the child ----------------------------------------------------------------------------------


def train(folder: Path, resume: bool) -> None:
    """One training, the same whoever starts it."""
    announce(folder.parent / PHASE)
    images, test = demo.digits()
    net = SuperNet.load(folder.parent / START)
    proxy, held_out = DataLoader(Subset(images, range(256)), 256), DataLoader(test, 360)
    recipe = Recipe.read(RECIPE, CHANGES)
    stratavit.train_piad(net, images, held_out, recipe, folder, proxy=proxy, resume=resume, cpu=True)


def announce(path: Path) -> None:
    """From now on the file tells what the training is doing."""
    file, phases = os.open(path, os.O_WRONLY), [REST]

    def tell() -> None:
        os.pwrite(file, phases[-1].ljust(30).encode(), 0)

    def noted(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            phases.append(phase)
            tell()
            try:
                return function(*args, **kwargs)
            finally:
                phases.pop()
                tell()

        return run

    for (owner, name), phase in PHASES.items():
        setattr(owner, name, noted(getattr(owner, name), phase))


# ---- the parent ---------------------------------------------------------------------------------


def super_network() -> SuperNet:
    """What all runs start from."""
    torch.manual_seed(0)
    images, _ = demo.digits()
    model = demo.small_vit()
    demo.train(model, images, 3, torch.device("cpu"))
    return SuperNet(model, demo.DATA_CONFIG).contract(DataLoader(Subset(images, range(256)), 256))


def start(folder: Path, resume: bool) -> subprocess.Popen[bytes]:
    """A process that trains."""
    (folder.parent / PHASE).write_text(STARTING)
    command = [sys.executable, __file__, "--child", str(folder), *(["--resume"] if resume else [])]
    with (folder.parent / ERRORS).open("wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def doing(folder: Path) -> str:
    return (folder.parent / PHASE).read_text().strip()


def wait_while(child: subprocess.Popen[bytes], go_on: Callable[[], bool]) -> None:
    """Looks every other millisecond, until the process has ended at the latest."""
    while go_on() and child.poll() is None:
        time.sleep(0.002)


def finish(child: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits for the end, which must be a good one."""
    if child.wait() != 0:
        sys.exit(f"killed: a training ended with {child.returncode}:\n{(folder.parent / ERRORS).read_text()}")


def left_alone(folder: Path) -> tuple[float, float]:
    """The run to compare with; seconds until it trains, and from there to its end."""
    begun = time.perf_counter()
    child = start(folder, resume=False)
    wait_while(child, lambda: doing(folder) == STARTING)
    started = time.perf_counter()
    finish(child, folder)
    return started - begun, time.perf_counter() - started


def interrupted(folder: Path, tally: Tally) -> None:
    """One run, killed again and again until it ends or no kill is due; then it is let finish."""
    child = start(folder, resume=False)
    while tally.kills < tally.due and kill(child, folder, tally):
        resume = (folder / run_files.STATE_FILE).exists()
        if resume:
            tally.steps.append(run_files.read_state(folder)["step"])
            tally.resumed += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)
            tally.anew += 1
        child = start(folder, resume)
    finish(child, folder)
    tally.runs += 1


def kill(child: subprocess.Popen[bytes], folder: Path, tally: Tally) -> bool:
    """Kills a run at a random moment; whether it was still alive."""
    aim = tally.generator.choice(AIMS)
    if aim == STARTING:
        delay = tally.generator.uniform(0, tally.startup)
    elif aim == REST:
        delay = tally.generator.uniform(0, tally.training / 3)
        wait_while(child, lambda: doing(folder) == STARTING)
    else:
        delay = tally.generator.uniform(0, 0.02)
        wait_while(child, lambda: doing(folder) != aim)
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.returncode != -signal.SIGKILL:
        return False
    tally.phases[doing(folder)] += 1
    return True


# ---- the comparison -----------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for times."""
    state = run_files.read_state(folder)
    log = run_files.Journal(folder / run_files.LOG_FILE).rows()
    return {
        **{name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, MOMENTS_FILE)},
        f"dropout list in {JSON_FILE}": json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))["strata"],
        **{f"{key} in {run_files.STATE_FILE}": state[key] for key in COMPARED_STATE},
        f"{run_files.LOG_FILE} without seconds": [{k: v for k, v in r.items() if k != "seconds"} for r in log],
    }


def same(found: Any, expected: Any) -> bool:
    """Equal to the last bit, through all nesting."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, Tensor):
        alike = found.dtype == expected.dtype and found.shape == expected.shape
        return alike and found.numpy().tobytes() == expected.numpy().tobytes()
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
