"""Means and moments that stay where they are in memory while they are measured anew.

A graph of `torch.compile` reads the tensors that it was compiled with, and has the numbers of then in its code; another
tensor or another number would compile it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stratavit.calibration import contraction
from stratavit.elastic.base import ElasticSite


class FixedPlaces:
    """The tensors of one network: name of a site -> its means; its factor, ridge and energy, if it has moments."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[Tensor]] = {}

    def put(self, elastic: Mapping[str, ElasticSite]) -> None:
        """Copies what was measured to where it was before, the numbers of moments as tensors."""
        for name, module in elastic.items():
            found = [module.channel_mean, *_tensors(module)]
            places = self.tensors.get(name)
            if places is None or [one.shape for one in places] != [one.shape for one in found]:
                places = self.tensors[name] = [torch.empty_like(one) for one in found]
            for place, value in zip(places, found, strict=True):
                place.copy_(value)
            contraction.set_mean(module, places[0])
            if module.moments is not None:
                numbers: Any = dict(zip(("factor", "ridge", "energy"), places[1:], strict=True))
                module.moments = dataclasses.replace(module.moments, **numbers)

    def release(self, elastic: Mapping[str, ElasticSite]) -> None:
        """Makes the numbers of moments numbers again."""
        for module in elastic.values():
            if self.tensors and module.moments is not None:
                ridge, energy = float(module.moments.ridge), float(module.moments.energy)
                module.moments = dataclasses.replace(module.moments, ridge=ridge, energy=energy)
        self.tensors = {}


def _tensors(module: ElasticSite) -> list[Tensor]:
    """Factor, ridge and energy of a module's moments; none if it has none."""
    if module.moments is None:
        return []
    factor = module.moments.factor
    wide = torch.float32 if factor.device.type == "mps" else torch.float64  # it has no other
    ridge = torch.as_tensor(module.moments.ridge, dtype=factor.dtype, device=factor.device)
    return [factor, ridge, torch.as_tensor(module.moments.energy, dtype=wide, device=factor.device)]
