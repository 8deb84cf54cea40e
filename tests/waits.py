"""Notices what a program reads from a device: operations whose result decides a number or a shape on the host."""

import dataclasses
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


class BlockingCopies(TorchDispatchMode):
    """Shapes of what is copied from one device to another, the program waiting."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ == "_to_copy" and not kwargs.get("non_blocking"):
            device = torch.device(kwargs.get("device") or args[0].device)
            if device.type != args[0].device.type:
                self.found.append(tuple(args[0].shape))
        return function(*args, **kwargs)


def on_fake_cuda(net):
    """Moves a network to a CUDA device that need not be there."""
    for module in net.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(tensor.shape, device="cuda"))
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    for site in net.elastic.values():
        factor = torch.empty(site.moments.factor.shape, device="cuda")
        site.moments = dataclasses.replace(site.moments, factor=factor)
    return net
