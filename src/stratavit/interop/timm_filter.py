"""Tensors of a checkpoint under timm's names and in the model's shapes, by the filter that timm itself runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from stratavit.errors import ArtifactError, one_line, out_of_memory
from stratavit.files.state_dicts import check_numbers
from stratavit.interop.checkpoint_names import ASIDE, last_of, listed, say_left_out, unwrapped, without_counters

Filter = Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]]


def filter_of(name: str) -> Filter | None:
    """What timm runs on a state dict before it loads it into a model of a name; None for nothing.

    timm gives its filters to a private builder; the arguments here are those of ``_create_deit`` and
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


def fitted(name: str, model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors that `load_weights` takes; what is left out or resampled is told on standard error.

    Args:
        name: timm's, of the model.
        model: That will hold them.
        tensors: As read from a file.
        source: Name of the weights, for errors.

    Raises:
        ArtifactError: timm's filter cannot read them.
    """
    own = model.state_dict()
    named = unwrapped(tensors, own, source)
    given = without_counters(named, own)
    for key, tensor in given.items():
        if key not in own or own[key].shape != tensor.shape:
            check_numbers(key, tensor, source)
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
    kept = {key: tensor for key, tensor in made.items() if key in own or last_of(key) not in ASIDE}
    say_left_out(named, kept, source)
    before = {id(tensor) for tensor in given.values()}
    new = [key for key, tensor in kept.items() if id(tensor) not in before and key in given]
    changed = [key for key in new if given[key].shape != kept[key].shape]
    if changed:
        first = changed[0]
        sizes = f"{tuple(given[first].shape)} to {tuple(kept[first].shape)}"
        print(f"weights: {source}: resampled as timm does: {listed(changed)}, from {sizes}", file=sys.stderr)
    return kept
