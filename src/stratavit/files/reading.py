"""Reading files that people could write: JSON, TOML, CSV, lists of names."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

LARGEST_TEXT = 64 << 20  # bytes of a JSON or text file; the longest list that a model can have is a few MB


def read_small(path: Path) -> bytes:
    """The bytes of a file that people could read.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger than such a file can be.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_TEXT >> 20} MB")
    return path.read_bytes()
