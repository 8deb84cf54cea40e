"""What fixes a model's function but for its weights, and the first part in which two models differ."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import nn

from stratavit.utils.model import computed_buffers

_ASIDE = {
    *("training", "fused_attn", "grad_checkpointing", "data_config", "provenance", "init_values", "embedding"),
    "target_shift_size",  # of windows: read when these are set anew, and then only whether it is 0
}


class Difference(NamedTuple):
    """A part in which a model differs from what timm builds.

    Attributes:
        name: Of the module, tensor or attribute.
        expected: What timm builds; None if it has no such part.
        found: What is there; None if the part is missing.
        buffer: It is a buffer that is saved, and in addition.
    """

    name: str
    expected: str | None
    found: str | None
    buffer: bool

    def __str__(self) -> str:
        if self.buffer:
            return f"{self.name} is a buffer that it does not have (a profiler or a counter left it): delete it"
        found = "is missing" if self.found is None else f"is {self.found}"
        expected = "no such part" if self.expected is None else self.expected
        return (
            f"{self.name} {found}, expected {expected}: put that back, merge what was added into the weights, or build "
            "the model by timm.create_model with the option that was changed"
        )


def difference(built: nn.Module, model: nn.Module) -> Difference | None:
    """The first part in which two models differ, apart from dropout rates; None if alike."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    ours, theirs = _parts(built, dtype), _parts(model, dtype)
    buffers = {name for name, _ in model.named_buffers()}
    names = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    more = (buffers | {name for name, _ in (*model.named_modules(), *model.named_parameters())}) - ours.keys()
    # what was added says more than what follows from it, and another module more than its tensors
    names.sort(key=lambda name: name not in more or name.rpartition(".")[0] in ours.keys() & set(names))
    found = (Difference(name, ours.get(name), theirs.get(name), name in buffers and name not in ours) for name in names)
    return next(found, None)


def _parts(root: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Every module, its plain attributes, and all shapes."""
    transient = (nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices, nn.Identity)
    lines: dict[str, str] = {}
    for name, module in root.named_modules():
        if isinstance(module, transient):
            continue
        if name:
            lines[name] = f"{type(module).__name__}({module.extra_repr()})"
        for key, value in vars(module).items():
            if key not in _ASIDE and not key.startswith("_") and _is_plain(value):
                lines[f"{name}.{key}".lstrip(".")] = str(value)
    lines |= {name: f"a buffer of shape {tuple(buffer.shape)}" for name, buffer in root.named_buffers()}
    for name, _, _, buffer in computed_buffers(root):  # they follow from the arguments, or differ
        lines.pop(name, None)
        if not buffer.is_meta:
            rounded = buffer.detach().to(dtype) if buffer.is_floating_point() else buffer.detach()
            digest = hashlib.blake2b(rounded.double().cpu().numpy().tobytes(), digest_size=16).hexdigest()
            lines[name] = f"a buffer of shape {tuple(buffer.shape)} that holds {digest}"
    return lines | {name: f"of shape {tuple(p.shape)}" for name, p in root.named_parameters()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, int | float | str | bool)
