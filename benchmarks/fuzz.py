"""Coverage-guided fuzzing of every reader of files: is there a content that is neither read nor refused in one line?

    python benchmarks/fuzz.py [--seconds 60] [--only READER ...] [--finds fuzz-finds]

Each reader runs in a process of its own under atheris (libFuzzer), StrataViT and the Python readers below it
instrumented, from sound files without hashes. A find is anything but an answer or a StrataViTError of one printable
line: another exception, a model that differs from its file, a process or a connection begun, a file outside opened,
more than 1 GiB of memory, or 30 seconds. Each is saved with its traceback; any makes the command fail.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

INSTRUMENTED = ["stratavit", "tomllib", "zipfile", "csv", "PIL"]
MEMORY = 1 << 30  # bytes that reading may add
SLOW = 30  # seconds for one input
LARGEST = 1 << 15  # bytes of an input
RESTARTS = 8  # after a process that died
BEGUN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
BEGUN += ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.rmdir")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=60, help="for each reader")
    arguments.add_argument("--only", nargs="+", metavar="READER", help="names, or parts of them")
    arguments.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder for what is found")
    args = arguments.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzz: atheris is not installed; pip install '.[fuzz]' (Linux only)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("fuzz: ended from outside"))  # and nothing is left
    instrument()
    from common import write_results
    from fuzz_readers import readers

    names = [name for name in readers(Path()) if args.only is None or any(part in name for part in args.only)]
    if not names:
        sys.exit(f"fuzz: no such reader; the readers are {', '.join(readers(Path()))}")
    rows = []
    for name in names:
        rows.append(fuzzed(name, args.seconds, args.finds.resolve()))
        print(rows[-1], flush=True)
    finds = sum(row["finds"] for row in rows)
    note = (
        "Edges: branches of the instrumented code that were reached. Folders have no hashes; archives of "
        "'(pickle in it)' have checksums that fit. An input may take "
        f"{MEMORY >> 20} MiB beside what the process has, and {SLOW} s."
    )
    write_results("fuzz", rows, note)
    if finds:
        sys.exit(f"fuzz: {finds} finds, saved in {args.finds}")


def instrument() -> None:
    """Imports everything once, for all processes: instrumented what reads in Python, the rest as it is."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import csv  # noqa: F401
        import zipfile  # noqa: F401

        import tomllib  # noqa: F401
        from PIL import Image

        Image.init()
    import timm  # noqa: F401
    import torch
    import torch._weights_only_unpickler as unpickler

    with atheris.instrument_imports(include=INSTRUMENTED):
        import fuzz_readers  # noqa: F401
    atheris.instrument_func(unpickler.Unpickler.load)
    torch.set_num_threads(1)


# ---- the parent ---------------------------------------------------------------------------------


def fuzzed(name: str, seconds: int, finds: Path) -> dict[str, Any]:
    """A row of the table: one reader for so many seconds, begun again where an input ended the process."""
    row: dict[str, Any] = {"reader": name, "executions": 0, "seconds": 0, "edges covered": 0}
    known = before = _finds(name, finds)
    for _ in range(RESTARTS):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            ended, said = _run(name, Path(work), finds, seconds - row["seconds"])
        row["executions"] += _largest(r"^stat::number_of_executed_units: +(\d+)|^#(\d+)\t", said)
        row["edges covered"] = max(row["edges covered"], _largest(r" cov: (\d+)", said))
        row["seconds"] += _largest(r"^Done \d+ runs in (\d+) second", said) or round(time.monotonic() - begun)
        found = _finds(name, finds)
        if ended and found == known:  # nothing was saved: not an input's fault
            sys.exit(f"fuzz: {name} ended with {ended}:\n{said[-3000:]}")
        known = found
        if not ended or row["seconds"] >= seconds:
            break
    return row | {"finds": len(known - before)}


def _run(name: str, work: Path, finds: Path, seconds: int) -> tuple[int, str]:
    """How a process that fuzzes a reader ended, and what it said."""
    log = work / "log"
    process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            fuzz(name, work, finds, seconds)
        except BaseException:
            log.write_text(traceback.format_exc())
        os._exit(1)
    try:
        _, status = os.waitpid(process, 0)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def _largest(pattern: str, text: str) -> int:
    found = [int(next(filter(None, match.groups()))) for match in re.finditer(pattern, text, re.MULTILINE)]
    return max(found, default=0)


def _stem(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def _finds(name: str, finds: Path) -> set[str]:
    return {path.name for path in finds.glob(f"{_stem(name)}--*") if path.suffix != ".txt"}


# ---- the process of a reader --------------------------------------------------------------------


def fuzz(name: str, work: Path, finds: Path, seconds: int) -> None:
    """Fuzzes one reader; libFuzzer ends the process."""
    import atheris
    from fuzz_readers import readers

    os.environ |= {"TMPDIR": str(work), "HF_HOME": str(work / "cache")}
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (warnings; libFuzzer writes to the descriptor itself)
    reader = readers(work)[name]()
    corpus, prefix = work / "corpus", finds / f"{_stem(name)}--"
    corpus.mkdir()
    finds.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds):
        (corpus / str(number)).write_bytes(seed)
        reader.check(seed)  # everything is imported and read once before anything is forbidden
    guarded = Guard(work)

    def one(data: bytes) -> None:
        try:
            with guarded:
                reader.check(data)
        except BaseException as error:
            keep(error, data, prefix)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        def flip(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, 2 * len(part) + 64))

        return bytes(reader.mutate(bytes(data), random.Random(seed), flip)[:longest])

    used, resident = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    options = [f"-max_total_time={seconds}", f"-timeout={SLOW}", f"-rss_limit_mb={(resident + MEMORY) >> 20}"]
    options += [f"-max_len={LARGEST}", "-len_control=0", "-print_final_stats=1", f"-artifact_prefix={prefix}"]
    atheris.Setup([sys.argv[0], *options, f"-report_slow_units={SLOW}", str(corpus)], one, custom_mutator=mutator)
    atheris.Fuzz()


class Forbidden(BaseException):
    """Reading did what reading does not."""


class Guard:
    """While it is entered, no process, connection or change of the disk is begun, and no file outside is opened."""

    def __init__(self, work: Path) -> None:
        inside = {str(work), sys.prefix, sys.base_prefix, *filter(None, sys.path)}
        self.inside = (*inside, "/proc/", "/sys/", os.devnull)
        self.on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Told by the interpreter of whatever leaves it."""
        if not self.on:
            return
        if event == "open":
            path = os.fspath(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
            where = os.path.abspath(os.fsdecode(path)) if path else os.devnull
            if not where.startswith(self.inside):
                raise Forbidden(f"opened {where}")
        elif event in BEGUN and not str(args[0]).startswith(self.inside[:1]):
            raise Forbidden(f"{event} {args}")

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *error: object) -> None:
        self.on = False


_seen: set[str] = set()


def keep(error: BaseException, data: bytes, prefix: Path) -> None:
    """Saves an input and the traceback, once for every place in the code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/benchmarks/" not in f.filename]
    kind = re.sub(r"\d+", "N", str(error))[:40] if isinstance(error, AssertionError | Forbidden) else ""
    place = f"{type(error).__name__} {kind} {frames[-1].filename + str(frames[-1].lineno) if frames else ''}"
    if place in _seen:
        return
    _seen.add(place)
    name = f"{prefix}{hashlib.sha256(data).hexdigest()[:12]}"
    Path(name).write_bytes(data)
    Path(f"{name}.txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")


if __name__ == "__main__":
    main()
