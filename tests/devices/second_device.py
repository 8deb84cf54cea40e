"""A device for torch that is not the CPU and needs no GPU, see second_device.cpp; also torch's module of it."""

import contextlib
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

NAME = "second"
SOURCE = Path(__file__).with_suffix(".cpp")


def register() -> torch.device:
    """Makes the device known to torch, for the rest of this process."""
    if not hasattr(torch, NAME):
        torch.ops.load_library(_built())
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, sys.modules[__name__])
        torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)


def reads() -> int:
    """How often the program has read from the device."""
    return torch.ops.second_device.reads()


def uploads() -> int:
    """How many tensors it has copied to the device and waited; numbers do not count."""
    return torch.ops.second_device.uploads()


@contextlib.contextmanager
def waiting_refused(uploads_too: bool = True):
    """Inside, a read is an error, and a blocking upload, too."""
    torch.ops.second_device.refuse(True, uploads_too)
    try:
        yield
    finally:
        torch.ops.second_device.refuse(False, False)


def compiler() -> list[str]:
    """The call of the C++ compiler: ``CXX``, or ``c++``."""
    return shlex.split(os.environ.get("CXX", "c++"))


def _built() -> Path:
    """The library, compiled once for every version of the source and of torch, next to what torch keeps for itself."""
    sources = SOURCE.read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(sources + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()).parent / "stratavit-tests" / f"{NAME}_device_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")  # another process may be at the same work
        parts = Path(torch.__file__).parent
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-isystem{parts / 'include'}", f"-L{parts / 'lib'}"]
        libraries = ["-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(new), *libraries], check=True)
        new.replace(path)
    return path


# ---- what torch asks its module of a device -------------------------------------------------------------------------


device = contextlib.nullcontext  # inside which a device is the current one


def is_available():
    return True


def device_count():
    return 1


def current_device():
    return 0


def synchronize(device=None):
    pass


def manual_seed_all(seed):
    """Random numbers are the CPU's."""


def get_rng_state(device=None):
    return torch.get_rng_state()


def set_rng_state(state, device=None):
    torch.set_rng_state(state)


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def _is_in_bad_fork():
    return False
