"""One training at a time in a folder: a lock file that names who holds it, and is taken over when they are gone."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stratavit.errors import ArtifactError, reason_of
from stratavit.folders import read_small
from stratavit.placing import put_file

if sys.platform != "win32":  # pragma: no branch: tests run on Linux
    import fcntl

FILE = "training.lock"


class Lock:
    """The lock of a run's folder.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.content = b""

    def check(self) -> bytes | None:
        """The lock of a process that is gone, or None where there is no lock.

        Raises:
            ArtifactError: A process holds the folder, or may.
        """
        try:
            content = read_small(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror}") from error
        holder = _holder(content)
        if holder is None:
            raise ArtifactError(f"{self.path} is no lock of StrataViT; remove it if no training writes to this folder")
        if holder["host"] == socket.gethostname() and not _lives(holder):
            return content
        raise ArtifactError(
            f"{self.path.parent} is written to by process {holder['pid']} on {holder['host']}, begun "
            f"{holder['begun']}: wait for it, or give another folder; if it is gone, remove {self.path}"
        )

    def take(self) -> None:
        """Takes the folder; the lock of a process that is gone is taken over, which is told on standard error.

        Raises:
            ArtifactError: See `check`; or the lock cannot be written.
        """
        try:
            with _alone(self.path.parent):
                stale = self.check()
                if stale is not None:
                    self._put_aside(stale)
                self._write()
        except FileExistsError as error:
            raise ArtifactError(f"{self.path.parent} was just taken by another process; give another folder") from error
        except OSError as error:
            raise ArtifactError(f"cannot write {self.path}: {reason_of(error)}") from error

    def release(self) -> None:
        """Gives the folder back, if it is held."""
        with suppress(OSError):
            if self.content and self.path.read_bytes() == self.content:
                self.path.unlink()

    def _write(self) -> None:
        """Makes the file, with its content from the first moment on."""
        me = {"pid": os.getpid(), "host": socket.gethostname(), "ticks": _ticks(os.getpid())}
        content = json.dumps(me | {"begun": time.strftime("%Y-%m-%d %H:%M:%S")}).encode()
        new = self.path.with_name(f".{FILE}.{uuid.uuid4().hex}")
        try:
            new.write_bytes(content)
            put_file(new, self.path)
            self.content = content
        finally:
            new.unlink(missing_ok=True)

    def _put_aside(self, stale: bytes) -> None:
        """Takes a lock away unless another process has put its own there meanwhile."""
        aside = self.path.with_name(f".{FILE}.{os.getpid()}")
        self.path.rename(aside)
        taken = aside.read_bytes() != stale
        if taken:
            aside.rename(self.path)
            raise FileExistsError
        aside.unlink()
        holder = _holder(stale) or {}
        print(f"took over {self.path.parent} from process {holder.get('pid')}, which is gone", file=sys.stderr)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time look for a lock and set its own; the system ends this when the process dies."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holder(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    types = {"pid": int, "host": str, "begun": str}
    sound = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in types.items())
    readable = sound and 0 < found["pid"] < 1 << 31 and (found["host"] + found["begun"]).isprintable()
    return found if readable else None


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process runs; a number that was given to another one meanwhile is told by when that began."""
    known = _stat(holder["pid"])
    if known is not None:
        state, ticks = known
        if state in ("Z", "X"):  # it has ended, and the one that began it has not asked how
            return False
        if holder.get("ticks") is not None:
            return bool(ticks == holder["ticks"])
    if os.name != "posix":  # pragma: no cover: tests run on Linux; there, asking would end the process
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _ticks(pid: int) -> int | None:
    """When a process began, in ticks since the machine started; None where the system does not tell, or it is gone."""
    known = _stat(pid)
    return None if known is None else known[1]


def _stat(pid: int) -> tuple[str, int] | None:
    """State and beginning of a process, from Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
