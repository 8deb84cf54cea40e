"""Images in tar files, such as the shards of a webdataset: read where they lie, nothing is unpacked."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from PIL import Image

from stratavit.data.image_files import in_natural_order, is_aside
from stratavit.data.image_reading import endings, open_bytes
from stratavit.errors import StrataViTError, one_line


def is_tar(path: str | Path) -> bool:
    """Whether it is called as a tar file."""
    return Path(path).suffix.lower() == ".tar"


class TarImages:
    """Opens images in tar files; can be sent to worker processes.

    timm's readers of tar files know three formats of images and one file or folder; here all formats count, as
    in folders, and any files.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, int, int]] = {}  # name -> tar file, first byte, number of bytes

    def add(self, path: str | Path) -> list[str]:
        """Finds the images of a tar file; other members, such as labels, are passed over.

        Returns:
            Their names, path of the file in front, in natural order.

        Raises:
            StrataViTError: The file cannot be read as a tar file that is not compressed, or holds no images.
        """
        read = endings()
        found: dict[str, tuple[str, int, int]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    aside = any(map(is_aside, member.name.removeprefix("./").split("/")))
                    if member.isfile() and not aside and os.path.splitext(member.name)[1].lower() in read:
                        found[f"{path}/{member.name}"] = str(path), member.offset_data, member.size
        except (tarfile.TarError, OSError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise StrataViTError(
                f"data: {path} cannot be read as a tar file ({reason}); expected a complete, uncompressed one"
            ) from error
        if not found:
            raise StrataViTError(f"data: {path} holds no images in a format that Pillow reads")
        self._places |= found
        return in_natural_order(found)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __call__(self, name: str) -> Image.Image:
        """An image that is not decoded yet.

        Raises:
            OSError: It cannot be read.
        """
        path, start, size = self._places[name]
        with open(path, "rb") as file:
            file.seek(start)
            return open_bytes(file.read(size))
