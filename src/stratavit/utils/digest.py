"""A hash of tensors, by which one tells that they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def digest_of(tensors: Iterable[tuple[Any, Tensor]]) -> bytes:
    """A hash of named tensors: names, types, shapes and numbers, however they were changed."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
