"""A hash and a version of tensors, by which one sees that they have changed."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

MOST_THREADS = 8
LEAST_BYTES = 2**20  # to start threads takes as long as to hash half of it


def digest_of(tensors: Iterable[tuple[Any, Tensor]]) -> bytes:
    """A hash of named tensors: names, types, shapes and numbers."""
    known = [(name, tensor.detach().contiguous()) for name, tensor in tensors]

    def own(pair: tuple[Any, Tensor]) -> bytes:
        name, tensor = pair
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    hashes = in_threads(own, known, sum(tensor.nbytes for _, tensor in known))
    return hashlib.blake2b(b"".join(hashes), digest_size=16).digest()


def in_threads(function: Callable[[Any], bytes], things: Sequence[Any], size: int) -> list[bytes]:
    """A function of each thing, in threads where these pay: hashes, which let other threads run meanwhile.

    Args:
        function: Must not start threads itself.
        things: What it is called with.
        size: Bytes of all.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS, len(things))
    if threads < 2 or size < LEAST_BYTES or not threading.main_thread().is_alive():  # then Python starts no more
        return list(map(function, things))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, things))


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version
