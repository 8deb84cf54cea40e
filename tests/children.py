"""Work in processes that may die, on disks of their own: forked from one that has imported all, so they are cheap."""

import contextlib
import ctypes
import multiprocessing
import os
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import stratavit

FOLDER = Path(__file__).parent
TESTS = os.pathsep.join(map(str, [FOLDER, *sorted(path for path in FOLDER.iterdir() if path.is_dir())]))
SOURCE = str(Path(stratavit.__file__).parents[1])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, TESTS, os.environ.get("PYTHONPATH")]))
NEW_MOUNTS, NEW_USERS, READ_ONLY, REMOUNT, BIND, PRIVATE = 0x20000, 0x10000000, 1, 32, 4096, 1 << 18 | 1 << 14


class Ended(NamedTuple):
    """How a child ended: its exit code, negative for a signal, and what it wrote on both streams."""

    code: int
    said: str

    @property
    def lines(self):
        """What it wrote, without what it says of the images that it reads."""
        return [line for line in self.said.strip().splitlines() if not line.startswith("data: ")]


@cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "stratavit.cli"])
    return context


@contextlib.contextmanager
def started(work, *args):
    """A child that calls `work`, a function of a module; exits with what that returns, if it is a number."""
    with tempfile.TemporaryFile() as said, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        patch.setenv("OMP_NUM_THREADS", "1")
        process = _context().Process(target=_work, args=(multiprocessing.reduction.DupFd(said.fileno()), work, args))
        process.start()
        process.said = lambda: said.seek(0) or said.read().decode(errors="replace")
        try:
            yield process
        finally:
            process.kill()
            process.join()


def child(work, *args, timeout=300):
    """Waits for a child, see `started`."""
    with started(work, *args) as process:
        process.join(timeout)
        assert process.exitcode is not None, f"still running after {timeout} s:\n{process.said()}"
        return Ended(process.exitcode, process.said())


def done(work, *args):
    """A child whose own assertions must hold."""
    ended = child(work, *args)
    assert ended.code == 0, ended.said


def _work(said, work, args):
    multiprocessing.set_start_method("fork", force=True)  # of its own children, as by default on Linux
    handle = said.detach()
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    try:
        code = work(*args)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)


# ---- disks ------------------------------------------------------------------------------------------------------


def _call(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mounted(place, size=None, read_only=False):
    """Mounts a small disk, or what is there already as read-only, where this process and its children see it alone."""
    users = NEW_USERS if os.geteuid() else 0
    user, group = os.geteuid(), os.getegid()
    _call("unshare", NEW_MOUNTS | users)
    if users:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", None, b"/", None, PRIVATE, None)
    path = os.fsencode(place)
    if size is not None:
        _call("mount", b"tmpfs", path, b"tmpfs", 0, f"size={size}".encode())
    if read_only:
        _call("mount", path, path, None, BIND, None)
        _call("mount", None, path, None, BIND | REMOUNT | READ_ONLY, None)
    return Path(place)


def _try(place):
    mounted(place, "64k", read_only=True)


@cache
def unmountable():
    """Why nothing can be mounted here; nothing if it can."""
    if sys.platform != "linux":
        return "small and read-only disks are made by Linux's means"
    with tempfile.TemporaryDirectory() as place:
        ended = child(_try, place)
    return "" if ended.code == 0 else f"this user may mount no disk, as root or in a user namespace: {ended.lines[-1]}"


def fill(disk, left=0):
    """Fills a disk but for so many bytes, in whole pages."""
    with contextlib.suppress(FileNotFoundError):
        (disk / "ballast").unlink()
    found = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, found.f_bavail * found.f_frsize - left // 4096 * 4096))


def content(folder):
    """Everything under a folder but for the ballast: path -> bytes, None for a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != "ballast"]
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}
