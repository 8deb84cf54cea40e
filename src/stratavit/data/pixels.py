"""What is told of an image by its pixels, and so does not depend on when or where a loader gives it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

SHORT = 8  # bytes of a key that `Seen` keeps


def keys_of(images: Tensor) -> list[bytes]:
    """A hash of 16 bytes for each of the images ``[B, C, H, W]``, of its pixels in float32 and its shape."""
    form = str(tuple(images.shape[1:])).encode()
    keys = []
    for image in images.detach().float().cpu():
        found = hashlib.blake2b(form, digest_size=16)
        found.update(image.contiguous().numpy())
        keys.append(found.digest())
    return keys


def folds_of(keys: Sequence[bytes]) -> Tensor:
    """Fold, 0 or 1, of each image, ``[B]``: a bit of its hash.

    Compensation fits the images that it was computed from better than others, so a list measured on these
    would take cuts for cheaper than they are. Images of one fold are measured with the moments of the other.
    """
    return torch.tensor([key[-1] & 1 for key in keys], dtype=torch.long)


def uniforms(keys: Sequence[bytes], seed: int) -> Tensor:
    """A number from 0 to below 1 for each image, ``[B]`` float64, as if drawn; fixed by image and seed."""
    salt = str(seed).encode()
    drawn = [hashlib.blake2b(key + salt, digest_size=8).digest() for key in keys]
    return torch.tensor([(int.from_bytes(one, "big") >> 11) / 2**53 for one in drawn], dtype=torch.float64)


class Seen:
    """Which images were seen: 8 bytes of each one's key."""

    def __init__(self) -> None:
        self._keys = bytearray()

    def add(self, keys: Sequence[bytes]) -> None:
        """Takes images as seen."""
        for key in keys:
            self._keys += key[:SHORT]

    def share(self, keys: Sequence[bytes]) -> float:
        """Share of these images that were seen, 0 to 1."""
        if not keys or not self._keys:
            return 0.0
        known, asked = (torch.frombuffer(bytearray(part), dtype=torch.int64) for part in (self._keys, _short(keys)))
        return float(torch.isin(asked, known).double().mean())


def _short(keys: Sequence[bytes]) -> bytes:
    return b"".join(key[:SHORT] for key in keys)
