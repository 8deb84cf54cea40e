"""Real commands that meet in one folder, and launchers that lose a process: who is refused, who goes on, what is left?

    python benchmarks/faults.py [--races 10]

Every case is a fresh `stratavit train` (or a launcher with two of them on CPUs) on noise images and a tiny model. The
tests have the same cases inside one process tree; here nothing is held back or waited for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from common import write_results
from PIL import Image

from stratavit import SuperNet
from stratavit.files import lock
from stratavit.training import run_files

CLASSES, IMAGES, PATIENCE = 4, 16, 240
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
RECIPE = {"batch-size": 8, "repeats": 1, "workers": 0, "tracker": "none", "list-epochs": 1, "save-steps": 1}
LAUNCH = ["torchrun", "--standalone", "--nproc_per_node", "2"]  # accelerate launch starts one process on CPUs
TRAIN = ["-m", "stratavit", "train"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--races", type=int, default=10)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare(work)
        rows = races(work, args.races)
        rows += launched(work)
    note = f"Two processes each: `{' '.join([*LAUNCH, *TRAIN])}`. A process that is killed gets SIGKILL."
    write_results("faults", rows, note)


def prepare(work: Path) -> None:
    """Noise images and a super-network."""
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        folder = work / "data" / str(number % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    model = timm.create_model("deit_tiny_patch16_224", **TINY)
    SuperNet(model).contract([torch.randn(8, 3, 32, 32, generator=generator)]).save(work / "net")


def command(work: Path, out: Path, epochs: int, *more: str) -> list[str]:
    options = {"data": work / "data", "out": out, "device": "cpu", "epochs": epochs, **RECIPE}
    return [*TRAIN, str(work / "net"), *[str(t) for key, value in options.items() for t in (f"--{key}", value)], *more]


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is gone afterwards."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words,
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.said = lambda: said.seek(0) or said.read()  # type: ignore[attr-defined]
        try:
            yield process
        finally:
            for pid in [*ranks(process.pid), process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def told(process: Any) -> list[str]:
    return [line for line in process.said().splitlines() if line.startswith("stratavit train:")]


def races(work: Path, count: int) -> list[dict[str, Any]]:
    """Two commands that are started together, again and again."""
    won = named = whole = 0
    for number in range(count):
        out = work / f"race-{number}"
        with (
            started(sys.executable, *command(work, out, 8)) as one,
            started(sys.executable, *command(work, out, 8)) as two,
        ):
            codes = [process.wait(PATIENCE) for process in (one, two)]
            won += sorted(codes) == [0, 2]
            winner, loser = (one, two) if codes[0] == 0 else (two, one)
            named += any(f"is written to by process {winner.pid} on" in line for line in told(loser))
        whole += bool(SuperNet.load(out)) and not (out / lock.FILE).exists()
        print(f"race {number}: {codes}", flush=True)
    return [
        {"what": "two commands started together", "value": count},
        {"what": "one trained, the other was refused", "value": won},
        {"what": "the other named the process that trains", "value": named},
        {"what": "the result is whole and the lock is gone", "value": whole},
    ]


def ranks(parent: int) -> list[int]:
    """Process ids of the trainings that a launcher has started, the first one first."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout
    own = {}
    for pid in map(int, found.split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        if rank:
            own[rank[0]] = pid
    return [own[rank] for rank in sorted(own)]


def begun(out: Path, step: int) -> None:
    """Waits until a run has saved its state at a step."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (out / run_files.STATE_FILE).exists() and run_files.read_state(out)["step"] >= step:
            return
        time.sleep(0.1)
    sys.exit(f"faults: {out} did not begin")


def launched(work: Path) -> list[dict[str, Any]]:
    """A launcher's training; a second launcher at the same folder; then one of the processes dies."""
    rows = []
    for dies in (0, 1):
        out = work / f"launched-{dies}"
        with started(*LAUNCH, *command(work, out, 100_000)) as first:
            begun(out, 1)
            before = run_files.read_state(out)["step"]
            rows += refused(work, out)
            begun(out, before + 1)
            rows.append({"what": "the first one trains on", "value": "yes"})
            processes = ranks(first.pid)
            at = time.monotonic()
            os.kill(processes[dies], signal.SIGKILL)
            code, seconds = first.wait(PATIENCE), time.monotonic() - at
            what = f"process {dies} of 2 killed: "
            rows.append({"what": what + "the launcher's exit code", "value": code})
            rows.append({"what": what + "seconds until all have ended", "value": round(seconds, 1)})
            rows.append({"what": what + "what the other says", "value": "; ".join(told(first)).replace(str(work), "")})
        step = run_files.read_state(out)["step"]
        with started(*LAUNCH, *command(work, out, 100_000, "--resume")) as again:
            begun(out, step + 1)
            rows.append({"what": what + "resumed and went on", "value": "yes"})
            at = time.monotonic()
            again.terminate()
            code, seconds = again.wait(PATIENCE), time.monotonic() - at
            rows.append({"what": "SIGTERM to the launcher: its exit code", "value": code})
            rows.append({"what": "SIGTERM to the launcher: seconds to its end", "value": round(seconds, 1)})
            stops = "; ".join(told(again)).replace(str(work), "")
            rows.append({"what": "SIGTERM to the launcher: what is said", "value": stops})
        shutil.rmtree(out)
    return rows


def refused(work: Path, out: Path) -> list[dict[str, Any]]:
    at = time.monotonic()
    with started(*LAUNCH, *command(work, out, 100_000, "--resume")) as second:
        code = second.wait(PATIENCE)
        line = (told(second) or [""])[0]
        return [
            {"what": "a second launcher: exit code", "value": code},
            {"what": "a second launcher: seconds", "value": round(time.monotonic() - at, 1)},
            {"what": "a second launcher: says who holds the folder", "value": "is written to by process" in line},
        ]


if __name__ == "__main__":
    main()
