"""Notices what a program reads from a device: operations whose result decides a number or a shape on the host."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "is_nonzero")


class Waits(TorchDispatchMode):
    """Names of the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch):
    """Names of all reads inside, `Waits` and those that no operation shows on a CPU: whole tensors."""
    with monkeypatch.context() as patched, Waits() as mode:
        for name in ("tolist", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, _noted(getattr(torch.Tensor, name), mode.found))
        yield mode.found


def _noted(method, found):
    def noted(tensor, *args, **kwargs):
        found.append(method.__name__)
        return method(tensor, *args, **kwargs)

    return noted
