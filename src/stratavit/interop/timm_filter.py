"""Tensors of checkpoints that other tools wrote, under a model's names and in its shapes.

Prefixes and tensors that the model does not need are dropped; the rest is done by the filter that timm itself runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from stratavit.errors import ArtifactError, one_line, out_of_memory, shown
from stratavit.files.state_dicts import check_dense

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # wrappers that sit at any depth
IN_FRONT = ("module.", "model.")  # wrappers around the full model
COUNTERS = ("total_ops", "total_params", "n_averaged")  # buffers that profilers and averaged models add
ASIDE = (*COUNTERS, "mask_token")  # which only pre-training uses
REBUILT = ("relative_position_index", "relative_coords_table", "attn_mask")  # which the model makes itself
Tensors = Mapping[str, Tensor]
Filter = Callable[[dict[str, Tensor], nn.Module], Tensors]


def filter_of(name: str) -> Filter | None:
    """What timm runs on a state dict before it loads it into a model of a name; None for nothing.

    timm passes its filters to a private builder; the arguments here are those of ``_create_deit`` and
    ``_create_vision_transformer``, and tests compare the outcome with timm's.
    """
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    found: Any = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if found is None:
        return None
    if len(inspect.signature(found).parameters) == 1:
        return lambda tensors, model: found(tensors)
    variant, family = name.partition(".")[0], module.__name__.rpartition(".")[2]
    if family == "deit":
        return partial(found, adapt_layer_scale=True)
    if family == "vision_transformer" and "flexi" in variant:
        return partial(found, interpolation="bilinear", antialias=False)
    if family == "vision_transformer" and "radio" in variant:
        corners = any(part in variant for part in getattr(module, "_RADIO_ALIGN_CORNERS", ()))
        return partial(found, interpolation="bilinear", antialias=False, align_corners=corners)
    return found


def fitted(name: str, model: nn.Module, tensors: Tensors, source: str) -> dict[str, Tensor]:
    """The tensors of the file `source` that timm's model of a name is to load, for `load_weights`.

    What is left out or resampled is reported on standard error.

    Raises:
        ArtifactError: timm's filter cannot read them, or two come to one name.
    """
    own = model.state_dict()
    named = without_prefixes(tensors, own, source)
    given = without_counters(named, own)
    for key, tensor in given.items():
        if key not in own or own[key].shape != tensor.shape:
            check_dense(key, tensor, source)
    made, run = given, filter_of(name)
    if run is not None:
        try:
            made = dict(run(dict(given), model))
        except Exception as error:  # what a filter raises for tensors of other models differs with the place
            if out_of_memory(error):
                raise MemoryError(one_line(error)) from error
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ArtifactError(
                f"{source}: timm cannot fit these weights to {name} ({reason}); are they of the same architecture?"
            ) from error
    kept = {key: tensor for key, tensor in made.items() if key in own or _last(key) not in ASIDE}
    report_left_out(named, kept, source)
    before = {id(tensor) for tensor in given.values()}
    new = [key for key, tensor in kept.items() if id(tensor) not in before and key in given]
    changed = [key for key in new if given[key].shape != kept[key].shape]
    if changed:
        sizes = f"{tuple(given[changed[0]].shape)} to {tuple(kept[changed[0]].shape)}"
        print(f"weights: {source}: resampled as timm does: {_listed(changed)}, from {sizes}", file=sys.stderr)
    return kept


def without_prefixes(tensors: Tensors, own: Tensors, source: str) -> dict[str, Tensor]:
    """Tensors under their names without what `torch.compile`, DDP, FSDP, Lightning and the like put in front.

    A prefix that one of the model's `own` tensors has is kept.

    Raises:
        ArtifactError: Two tensors come to one name.
    """
    prefixes = tuple(prefix for prefix in IN_FRONT if not any(name.startswith(prefix) for name in own))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in INSIDE)
        while short.startswith(prefixes):
            short = short.partition(".")[2]
        if short in found:
            raise ArtifactError(f"{source}: {shown(short)} is there twice, under {shown(name)} too; keep one of them")
        found[short] = tensor
    return found


def without_counters(tensors: Tensors, own: Tensors) -> dict[str, Tensor]:
    """All but the counters of profilers that the model itself does not have."""
    return {key: tensor for key, tensor in tensors.items() if key in own or _last(key) not in COUNTERS}


def report_left_out(tensors: Tensors, kept: Tensors, source: str) -> None:
    """Reports which tensors of a file are not in `kept`, under any name, but for those that the model makes itself."""
    before, after = ({id(tensor) for tensor in those.values()} for those in (tensors, kept))
    gone = [key for key, tensor in tensors.items() if key not in kept and id(tensor) not in after]
    names = [key for key in gone if _last(key) in ASIDE]
    joined = any(key not in tensors and id(tensor) not in before for key, tensor in kept.items())
    if not joined:  # else what is gone may be part of another tensor
        names += [key for key in gone if _last(key) not in (*ASIDE, *REBUILT)]
    if names:
        print(f"weights: {source}: left out {_listed(names)}, which the model does not have", file=sys.stderr)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: list[str]) -> str:
    """The first names of a list, for a sentence."""
    first = ", ".join(shown(name, 60) for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
