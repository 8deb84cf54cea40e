"""Which module of a host a user means."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from stratavit.errors import UnsupportedModelError, shown
from stratavit.interop.part_sites import candidates


def find_part(host: nn.Module, name: str) -> str:
    """The full name of a part.

    Args:
        host: The model that holds it.
        name: Its name (``backbone``), or the end of it if only one module ends so; empty for the host itself.

    Raises:
        UnsupportedModelError: There is none, or several; the parts that could be meant are named.
    """
    names = [one for one, _ in host.named_modules()]
    if name in names:
        return name
    ends = [one for one in names if one.endswith(f".{name}")]
    outermost = [one for one in ends if not any(one.startswith(f"{other}.") for other in ends)]
    if len(outermost) == 1:
        return outermost[0]
    near = [
        one for one in names if one.rpartition(".")[2] in get_close_matches(name, [n.rpartition(".")[2] for n in names])
    ]
    parts = outermost or list(dict.fromkeys([*near[:2], *image_parts(host)]))
    meant = (
        f"did you mean {' or '.join(parts[:5])}?" if parts else "it holds no module that reads images and can be cut"
    )
    fault = "several modules have that name" if outermost else "there is no such module"
    raise UnsupportedModelError(f"part {shown(name)!r} of this {type(host).__name__}: {fault}; {meant}")


def image_parts(host: nn.Module) -> list[str]:
    """The innermost modules that hold both a convolution, which reads images, and modules that can be cut."""
    cut = [name for name, _, _ in candidates(host)]
    reads = [name for name, module in host.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]

    def holds(name: str) -> bool:
        start = f"{name}."
        return any(one.startswith(start) for one in cut) and any(one.startswith(start) for one in reads)

    found = [name for name, _ in host.named_modules() if name and holds(name)]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
