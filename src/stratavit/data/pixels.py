"""What follows from an image's pixels alone, and so does not depend on when or where a loader yields it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stratavit.utils.digest import in_threads

KEY_BYTES = 16


def keys_of(images: Tensor) -> list[bytes]:
    """A hash of `KEY_BYTES` for each of the images ``[B, C, H, W]``, of its pixels in float32 and its shape."""
    shape = str(tuple(images.shape[1:])).encode()

    def key_of(image: Tensor) -> bytes:
        key = hashlib.blake2b(shape, digest_size=KEY_BYTES)
        key.update(image.numpy().data)
        return key.digest()

    pixels = images.detach().cpu().float().contiguous()
    return in_threads(key_of, pixels.unbind(), pixels.nbytes)


class Keyed(NamedTuple):
    """Images alike in shape and type, and their keys.

    Attributes:
        images: ``[C, H, W]`` each.
        keys: `keys_of` them.
    """

    images: Sequence[Tensor]
    keys: Sequence[bytes]

    def batch(self) -> Tensor:
        """The images together, ``[B, C, H, W]``."""
        return torch.stack(list(self.images))


def folds_of(keys: Sequence[bytes]) -> Tensor:
    """Fold, 0 or 1, of each image, ``[B]``: a bit of its hash.

    Compensation fits the images that it was computed from better than others, so a list measured on these
    would underestimate what cuts cost. Images of one fold are measured with the moments of the other.
    """
    return torch.tensor([key[-1] & 1 for key in keys], dtype=torch.long)


def uniforms(keys: Sequence[bytes], seed: int) -> Tensor:
    """A pseudorandom number in [0, 1) for each image, ``[B]`` float64, fixed by image and seed."""
    salt = str(seed).encode()
    drawn = [hashlib.blake2b(key + salt, digest_size=8).digest() for key in keys]
    return torch.tensor([(int.from_bytes(one, "big") >> 11) / 2**53 for one in drawn], dtype=torch.float64)


class Seen:
    """Which images were seen, by their keys."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()

    def add(self, keys: Sequence[bytes]) -> None:
        """Counts images as seen."""
        self._keys.update(keys)

    def share(self, keys: Sequence[bytes]) -> float:
        """Share of these images that were seen, 0 to 1; 0 of no images."""
        return sum(key in self._keys for key in keys) / max(len(keys), 1)
