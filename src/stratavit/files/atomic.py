"""Files and folders that appear complete or not at all: written next to their place, brought to the disk, moved there.

If the process is killed at any moment, the old one or the new one is in its place. What it left next to it is removed
by the next write there, where a folder can be locked (not on Windows, not on NFS).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from stratavit.errors import ArtifactError, StrataViTError, reason_of

if sys.platform != "win32":  # pragma: no branch: tests run on Linux
    import fcntl

NEW, OLD, END = "new", "old", ".part"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)
_HERE, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yields a place `new` in a temporary folder on the disk of `path`; removed afterwards, as are unused new parents.

    Raises:
        ArtifactError: Something cannot be written.
    """
    folder, held = None, None
    with none_empty(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            folder, held = _held_folder(path)
            yield folder / NEW
        except (OSError, SafetensorError, ArtifactError) as error:
            if isinstance(error, ArtifactError) and str(folder) not in str(error):
                raise
            kept = folder is None or _clear(folder, path)
            then = "nothing was changed there" if kept else f"what was there is {folder}/{OLD}, move it back"
            raise ArtifactError(f"cannot write {path}: {reason_of(error)}; {then}") from error
        finally:
            if folder is not None:
                _clear(folder, path)
            if held is not None:
                os.close(held)


@contextmanager
def none_empty(folder: Path) -> Iterator[None]:
    """Afterwards removes a folder and its parents, as far as they were not there before and are empty."""
    made = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):  # not empty, as it should be, or never made
                place.rmdir()


def move_into_place(new: Path, path: Path, overwrite: bool) -> None:
    """Moves a file or a folder to where it belongs, after all of it is on the disk.

    Args:
        new: The place that `temporary_sibling` yielded.
        path: Where it belongs.
        overwrite: Replace what is there; otherwise only an empty folder is replaced.

    Raises:
        ArtifactError: Another process wrote there meanwhile.
        OSError: It cannot be moved; what was there is as it was, or put back when `temporary_sibling` ends.
    """
    for file in [*new.rglob("*"), new] if new.is_dir() else [new]:
        _sync(file)
    try:
        if not new.is_dir():
            (os.replace if overwrite else _put_file)(new, path)
        elif overwrite:
            _put_over(new, path)
        else:
            _put_folder(new, path)
    except OSError as error:
        if error.errno not in _TAKEN or overwrite:
            raise
        raise ArtifactError(
            f"another process wrote {path} meanwhile; give another name or ask to overwrite (--overwrite)"
        ) from error
    with suppress(OSError):
        _sync(path.parent)


def followed(path: Path) -> Path:
    """What a link leads to; any other path as it is.

    Raises:
        OSError: It leads to itself.
    """
    if not path.is_symlink():
        return path
    with suppress(FileNotFoundError):  # what will be written
        path.stat()
    return path.resolve()


@contextmanager
def readable_errors(path: Path, then: str = "") -> Iterator[None]:
    """Turns an error of the system while `path` is written into one sentence; `then`: what is left, or what to do.

    Raises:
        ArtifactError: Something cannot be written.
    """
    try:
        yield
    except StrataViTError:
        raise
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"cannot write {path}: {reason_of(error)}{then and f'; {then}'}") from error


def _sync(path: Path) -> None:
    if os.name != "posix":  # pragma: no cover: tests run on Linux
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT or not path.is_dir():  # some file systems sync files only
            raise
    finally:
        os.close(handle)


def _put_file(new: Path, path: Path) -> None:
    """Gives a file its name; FileExistsError if another has it."""
    try:
        os.link(new, path)
    except OSError:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        new.rename(path)  # on a file system without links


def _put_folder(new: Path, path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # pragma: no cover: tests run on Linux, where it is renamed over
        path.rmdir()
    new.rename(path)


def _put_over(new: Path, path: Path) -> None:
    if not path.exists():
        try:
            return _put_folder(new, path)
        except OSError as error:  # another process put its own there just now
            if error.errno not in _TAKEN:
                raise
    if not _exchanged(new, path):
        path.rename(new.with_name(OLD))  # from here on `_clear` puts it back, whatever comes
        new.rename(path)


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two folders change places in one step; False where system or file system cannot."""
    linux = sys.platform.startswith("linux")
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if linux else None
    if swap is None:
        return False
    if swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number))


def _clear(folder: Path, path: Path) -> bool:
    """Removes a temporary folder, unless it holds what was at `path` and that cannot be put back: then False."""
    if (folder / OLD).exists() and not path.exists():
        try:
            (folder / OLD).rename(path)
        except OSError:
            return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _start(path: Path) -> str:
    return f".{path.name[:100]}."


def _held_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder next to `path`, held so that others see that it is in use for as long as this process lives."""
    for _ in range(100):
        folder = Path(tempfile.mkdtemp(prefix=_start(path), suffix=END, dir=path.parent))
        with suppress(FileNotFoundError, BlockingIOError):  # another process swept it away before it was held
            held = _hold(folder)
            if held is None or folder.exists():
                return folder, held
            os.close(held)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _hold(folder: Path) -> int | None:
    """Locks a folder; None if the file system cannot, BlockingIOError if another process holds it."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _sweep(path: Path) -> None:
    """Removes what killed processes left next to `path`; if one died between two renames, puts the old one back."""
    ours = re.compile(re.escape(_start(path)) + "[a-z0-9_]{8}" + re.escape(END))  # as mkdtemp names them
    for left in filter(ours.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            held = _hold(path.parent / left)
            if held is not None:
                try:
                    _clear(path.parent / left, path)
                finally:
                    os.close(held)
