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
_LIGHTEST = 65535
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF: bits of a number; 0 if the lowest number is white
_TOLERANCE = 1e-4


def endings() -> frozenset[str]:
    """Endings of the files that Pillow decodes, in small letters, such as ``.webp``."""
    known = set(formats())
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes, in the order in which it tries them."""
    Image.preinit()  # the usual formats first, as Pillow itself has them
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


def open_image(path: str) -> Image.Image:
    """An image that is not decoded yet.

    It is read from memory: of a file, parts of a damaged length would be made room for before it is found too short.
    What a file is goes by its content.

    Raises:
        OSError: It is no regular file (a pipe would be waited for), or no image.
    """
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return Image.open(io.BytesIO(Path(path).read_bytes()), formats=formats())


def decoded(image: Image.Image, mode: str, path: str) -> Image.Image:
    """Its first frame in 8 bits: upright as its EXIF data says, more bits scaled by their type, transparency dropped.

    Args:
        image: See `open_image`.
        mode: ``RGB`` or ``L``.
        path: For messages.

    Raises:
        StrataViTError: The image has whole numbers or floats of which nothing says what is white.
    """
    image.load()
    tags: Any = getattr(image, "tag_v2", {})
    negative = tags.get(_PHOTOMETRIC) == 0  # Pillow turns it over in 8 bits only
    if image.mode.startswith("I;16"):
        white: float | None = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif image.mode == "I":
        white = _white_of_integers(image, path)
    else:
        white = _white_of_floats(image, path) if image.mode == "F" else None
    image = _upright(image)
    if white is not None:
        image = _scaled(image, white, negative)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns of a direct way
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says, if that can be read."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:  # what Pillow raises for damaged EXIF data differs; the pixels are sound
        if out_of_memory(error):
            raise
        return image


def _scaled(image: Image.Image, white: float, negative: bool) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    values = white - values if negative else values
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _white_of_integers(image: Image.Image, path: str) -> int:
    """What is white in an image of 32-bit integers, which Pillow makes of several 16-bit forms, too."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    tags: Any = getattr(image, "tag_v2", {})
    if image.format in ("PNG", "PPM"):  # 16 bits by the format
        return _LIGHTEST
    if low >= 0 and tuple(tags.get(_BITS, ())) == (16,):
        return 32767  # 16 bits with a sign
    if low == high == 0 or (low >= 0 and 255 < high <= _LIGHTEST):
        return _LIGHTEST
    raise _unknown(path, f"whole numbers from {low} to {high}")


def _white_of_floats(image: Image.Image, path: str) -> int:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if low >= -_TOLERANCE and high <= 1 + _TOLERANCE:  # not if one of them is NaN
        return 1
    raise _unknown(path, f"floats from {low:g} to {high:g}, expected 0 to 1")


def _unknown(path: str, found: str) -> StrataViTError:
    return StrataViTError(
        f"data: {path} holds {found}, and nothing says which of them is white; save the images in 8 or 16 bits"
    )
