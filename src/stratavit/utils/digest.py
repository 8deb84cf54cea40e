"""A hash and a version of tensors, by which one sees that they have changed."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest_of(tensors: Iterable[tuple[Any, Tensor]]) -> bytes:
    """A hash of named tensors: names, types, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version
