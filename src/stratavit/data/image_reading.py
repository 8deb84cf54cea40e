"""One image file to 8-bit pixels: in every format that Pillow decodes, upright, and scaled by its type."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from stratavit.errors import StrataViTError, out_of_memory

# programs, drawings and films, and formats of which Pillow knows the head only
_NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF: bits of a number; 0 if the lowest number is white
_TOLERANCE = 1e-4


def endings() -> frozenset[str]:
    """Endings of the files that Pillow decodes, in lower case, such as ``.webp``."""
    known = set(formats())
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes, in the order in which it tries them."""
    Image.preinit()  # the usual formats first, as Pillow itself has them
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


def open_image(path: str) -> Image.Image:
    """An image that is not decoded yet, of the format that its content says.

    Raises:
        OSError: It is not a regular file (reading from a pipe would wait), or not an image.
    """
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return open_bytes(Path(path).read_bytes())


def open_bytes(content: bytes) -> Image.Image:
    """The same of the content of a file.

    It is read from memory: of a damaged file Pillow would allocate the length that it announces.

    Raises:
        OSError: It is not an image.
    """
    return Image.open(io.BytesIO(content), formats=formats())


def decoded(image: Image.Image, mode: str, path: str) -> Image.Image:
    """The first frame in 8 bits, mode ``RGB`` or ``L``: upright by its EXIF data, without transparency.

    Raises:
        StrataViTError: Nothing says which of its integers or floats is white; the message names `path`.
    """
    image.load()
    white = _white(image, path)
    negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # Pillow inverts it in 8 bits only
    image = _upright(image)
    if white is not None:
        values = np.asarray(image).astype(np.float64)
        values = (white - values if negative else values) * (255 / white)
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns of a direct way
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:  # what Pillow raises for damaged EXIF data differs; the pixels are sound
        if out_of_memory(error):
            raise
        return image


def _white(image: Image.Image, path: str) -> int | None:
    """The value of white in an image of more than 8 bits; None of the others, which Pillow scales."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        return int(2 ** tags.get(_BITS, (16,))[0] - 1)
    if image.mode not in ("I", "F"):
        return None
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    kind = "integers" if image.mode == "I" else "floats"
    if kind == "floats":
        if low >= -_TOLERANCE and high <= 1 + _TOLERANCE:  # not if one of them is NaN
            return 1
    elif image.format in ("PNG", "PPM"):  # 16 bits by the format
        return 65535
    elif low >= 0 and tuple(tags.get(_BITS, ())) == (16,):
        return 32767  # 16 bits with a sign
    elif low == high == 0 or (low >= 0 and 255 < high <= 65535):
        return 65535
    raise StrataViTError(
        f"data: {path} holds {kind} from {low:g} to {high:g}, and nothing says which of them is white; save the images "
        "in 8 or 16 bits, or as floats in 0 to 1"
    )
