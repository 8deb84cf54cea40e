"""Images that stand in two splits, by which a model is measured on what it was made from."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stratavit.data.image_files import list_images
from stratavit.data.image_folder import ImageLoader
from stratavit.data.splits import find_split
from stratavit.errors import StrataViTError, shown

MOST = 1000  # images that are looked for in another split


def shared_images(images: Sequence[str], others: Sequence[str], most: int = MOST) -> list[tuple[str, str]]:
    """Files of the same content in two lists.

    Args:
        images: Paths; at most this many of them, evenly spread, are looked for.
        others: Where: of these only files of the same size are read.
        most: See `images`.

    Returns:
        Path, and one of the others; a file that cannot be read is in no pair.
    """
    count = min(most, len(images))
    chosen = [images[index * len(images) // count] for index in range(count)]
    sizes = {path: size for path in chosen if (size := _size(path)) is not None}
    wanted = set(sizes.values())
    alike = {path: size for path in others if (size := _size(path)) in wanted}
    known = {_digest(path): path for path in alike}
    known.pop(None, None)
    there = set(alike.values())
    pairs = [(path, known.get(_digest(path))) for path, size in sizes.items() if size in there]
    return [(path, other) for path, other in pairs if other is not None]


def report_shared_images(loader: ImageLoader, data: str | Path, split: str) -> None:
    """Says on standard error if images of a loader are in another split of the data set, too, as far as it can be read.

    Args:
        loader: Its images are looked for.
        data: The data set.
        split: ``train`` or ``val``.
    """
    with suppress(StrataViTError):  # the other split is not what was asked for
        folder = find_split(data, split) if os.environ.get("RANK", "0") == "0" else None  # one process reports
        if folder is None:
            return
        images = [loader.dataset.samples[index][0] for index in loader.chosen]
        pairs = shared_images(images, [path for path, _ in list_images(folder).samples])
        if pairs:
            both = " = ".join(map(shown, pairs[0]))
            print(
                f"data: warning: {len(pairs)} of {min(MOST, len(images))} images of {loader.dataset.listing.folder} "
                f"are in {folder}, too (first {both}): what is measured there is too good; take them out of one",
                file=sys.stderr,
            )


def _size(path: str) -> int | None:
    """Bytes of a regular file; of no other, as reading a pipe would wait."""
    with suppress(OSError):
        return os.path.getsize(path) if os.path.isfile(path) else None
    return None


def _digest(path: str) -> bytes | None:
    with suppress(OSError):
        return hashlib.blake2b(Path(path).read_bytes()).digest()
    return None
