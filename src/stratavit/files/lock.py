"""One training at a time in a folder: a file that the system locks for as long as the process lives.

The content of the file, who holds it, is for people only; the lock itself is the system's (`flock`), so it ends with
its process, however that ends, in whatever container it runs.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

from stratavit.errors import ArtifactError, reason_of
from stratavit.files.reading import read_small

if sys.platform == "win32":  # pragma: no cover: tests run on Linux
    import msvcrt
else:
    import fcntl

FILE = "training.lock"
PATIENCE = 10  # attempts before a lock that is held is reported: another process may only be looking, too
PAUSE = 0.05  # seconds between them
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Lock:
    """The lock of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.handle: int | None = None

    def take(self) -> None:
        """Locks the folder until `release` or the end of the process.

        Raises:
            ArtifactError: Another process holds it, or the file cannot be locked or written.
        """
        try:
            self.handle = self._open()
            if hasattr(os, "register_at_fork"):  # workers that read images must not hold it after this process ended
                mine = weakref.ref(self)
                os.register_at_fork(after_in_child=lambda: _let_go(mine()))
            me = {"pid": os.getpid(), "host": socket.gethostname(), "begun": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(self.handle, 0)
            os.write(self.handle, json.dumps(me).encode())
        except OSError as error:
            self.release()
            raise ArtifactError(f"cannot write {self.path}: {reason_of(error)}") from error

    def release(self) -> None:
        """Unlocks the folder, if it is held."""
        if self.handle is None:
            return
        with suppress(OSError):
            if sys.platform != "win32" and os.path.samestat(os.fstat(self.handle), self.path.stat()):
                self.path.unlink()  # while it is held: whoever waits for this file sees that it is no longer there
        _let_go(self)
        if sys.platform == "win32":  # pragma: no cover: open files cannot be removed there
            with suppress(OSError):
                self.path.unlink()

    def _open(self) -> int:
        """Opens and locks the file; OSError if it cannot be opened, ArtifactError if it cannot be locked."""
        for _ in range(PATIENCE):
            handle = os.open(self.path, _OPEN, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise ArtifactError(f"{self.path} is not a lock of StrataViT; remove it")
                _lock(handle)
                with suppress(FileNotFoundError):  # its holder removed it meanwhile
                    if os.path.samestat(os.fstat(handle), self.path.stat()):
                        kept, handle = handle, -1
                        return kept
            except OSError as error:
                if error.errno not in _HELD:
                    raise ArtifactError(
                        f"cannot lock {self.path}: {reason_of(error)}; give a folder on a disk that can lock files"
                    ) from error
                time.sleep(PAUSE)
            finally:
                if handle >= 0:
                    os.close(handle)
        raise ArtifactError(
            f"{self.path.parent} is written to by {_holder(self.path)}: wait for it, or give another folder"
        )


def _let_go(lock: Lock | None) -> None:
    """Closes the file; in a forked process the parent still holds it."""
    if lock is not None and lock.handle is not None:
        with suppress(OSError):
            os.close(lock.handle)
        lock.handle = None


def _lock(handle: int) -> None:
    if sys.platform == "win32":  # pragma: no cover: tests run on Linux
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # behind the content, which stays readable
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(read_small(path))
        named = f"process {int(found['pid'])} on {found['host']}, begun {found['begun']}"
        if named.isprintable() and len(named) < 400:
            return named
    return "another process"
