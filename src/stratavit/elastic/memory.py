"""What a super-network holds in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from stratavit.elastic.base import ElasticSite


@dataclass(frozen=True)
class Memory:
    """Bytes that a super-network holds.

    Attributes:
        weights: Of the full model; every size is a part of them.
        means: Means of channels, and the final mean.
        moments: Second moments, which serve any spec.
        corrected: `proj` and `fc2` of the specialised specs.
    """

    weights: int
    means: int
    moments: int
    corrected: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.means + self.moments + self.corrected

    def __str__(self) -> str:
        parts = {"weights": self.weights, "means": self.means, "moments": self.moments, "corrected": self.corrected}
        text = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
        return f"{self.total / 1e6:.2f} MB: {text}; {self.total / self.weights:.3f} x the full model"


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(weights: Iterable[Tensor], modules: Iterable[ElasticSite], final_mean: Tensor | None) -> Memory:
    """What a network holds, by kind.

    Args:
        weights: Its state dict's tensors.
        modules: Its sites.
        final_mean: Vectors of the final mean, if any.
    """
    modules = list(modules)
    known = [one for module in modules if (one := module.moments) is not None]
    known += [moments for module in modules for _, moments in module.crossed]
    means = [module.channel_mean for module in modules]
    means += [mean for module in modules for mean, _ in module.crossed]
    means += [] if final_mean is None else [final_mean]
    return Memory(
        weights=size_of(weights),
        means=size_of(means),
        moments=size_of(one.factor for one in known),
        corrected=size_of(t for m in modules for one in m.corrected.values() for t in one.pair),
    )
