"""Names of tensors in checkpoints that other tools wrote: prefixes, and tensors that nobody needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from stratavit.errors import ArtifactError, shown

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # wrappers that sit at any depth
IN_FRONT = ("module.", "model.")  # wrappers around the whole model
COUNTERS = ("total_ops", "total_params", "n_averaged")  # buffers that profilers and averaged models add
ASIDE = (*COUNTERS, "mask_token")  # which only pre-training uses
REBUILT = ("relative_position_index", "relative_coords_table", "attn_mask")  # which the model makes itself


def unwrapped(tensors: Mapping[str, Tensor], own: Iterable[str], source: str) -> dict[str, Tensor]:
    """Tensors under their names without what `torch.compile`, DDP, FSDP, Lightning and the like put in front.

    Args:
        tensors: As read.
        own: Names of the model's tensors: a prefix that one of them has stays.
        source: Name of the weights, for errors.

    Raises:
        ArtifactError: Two tensors come to one name.
    """
    kept = tuple(own)
    prefixes = tuple(prefix for prefix in IN_FRONT if not any(name.startswith(prefix) for name in kept))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in INSIDE)
        while short.startswith(prefixes):
            short = short.partition(".")[2]
        if short in found:
            raise ArtifactError(f"{source}: {shown(short)} is there twice, under {shown(name)} too; keep one of them")
        found[short] = tensor
    return found


def without_counters(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but what profilers count, which no model of theirs has."""
    return {key: tensor for key, tensor in tensors.items() if key in own or last_of(key) not in COUNTERS}


def say_left_out(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], source: str) -> None:
    """Tells on standard error which tensors nobody needs; those that the model makes itself are not worth a word.

    Args:
        tensors: All of a file, under their names without prefixes.
        kept: Of these, under any name.
        source: Name of the weights.
    """
    before, after = ({id(tensor) for tensor in those.values()} for those in (tensors, kept))
    gone = [key for key, tensor in tensors.items() if key not in kept and id(tensor) not in after]
    told = [key for key in gone if last_of(key) in ASIDE]
    joined = any(key not in tensors and id(tensor) not in before for key, tensor in kept.items())
    if not joined:  # else what is gone may be part of another tensor
        told += [key for key in gone if last_of(key) not in (*ASIDE, *REBUILT)]
    if told:
        print(f"weights: {source}: left out {listed(told)}, which the model does not have", file=sys.stderr)


def last_of(name: str) -> str:
    """The last part of a tensor's name."""
    return name.rpartition(".")[2]


def listed(names: list[str]) -> str:
    """The first names of a list, for a sentence."""
    first = ", ".join(shown(name, 60) for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
