"""A hash and a version of tensors, by which one sees that they have changed."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def digest_of(tensors: Iterable[tuple[Any, Tensor]]) -> bytes:
    """A hash of named tensors: names, types, shapes and numbers."""

    def own(pair: tuple[Any, Tensor]) -> bytes:
        name, tensor = pair
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    return hashlib.blake2b(b"".join(in_threads(own, list(tensors))), digest_size=16).digest()


def in_threads(function: Callable[[Any], bytes], things: Sequence[Any]) -> list[bytes]:
    """A function of each thing, in as many threads as torch uses: hashes, which let other threads run meanwhile."""
    threads = min(torch.get_num_threads(), len(things))
    if threads < 2:
        return list(map(function, things))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, things))


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version
