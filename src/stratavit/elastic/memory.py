"""What a super-network holds in memory, and what of it is made ready to be served."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
        deltas: What recovery of all sizes has learned.
        projected: What compensated widths share, kept once one was computed on a CPU.
    """

    weights: int
    means: int
    moments: int
    corrected: int
    deltas: int
    projected: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.means + self.moments + self.corrected + self.deltas + self.projected

    def __str__(self) -> str:
        text = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in asdict(self).items())
        return f"{self.total / 1e6:.2f} MB: {text}; {self.total / self.weights:.3f} x the full model"


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def memory_of(net: Any) -> Memory:
    """What a `SuperNet` holds, by kind."""
    sites: list[ElasticSite] = list(net.elastic.values())
    own = [(site.channel_mean, site.moments) for site in sites]
    known = [*own, *(pair for site in sites for pair in site.crossed)]
    return Memory(
        weights=size_of(net.state_dict().values()),
        means=size_of(mean for mean, _ in known) + (0 if net.final_mean is None else net.final_mean.vectors.nbytes),
        moments=sum(moments.nbytes for _, moments in known if moments is not None),
        corrected=size_of(t for site in sites for one in site.corrected.values() for t in one.pair),
        deltas=size_of(t for site in sites if site.delta is not None for t in site.delta.parts() if t is not None),
        projected=size_of(t for site in sites if site.projected is not None for t in site.projected.tensors),
    )


def specialise(elastic: Mapping[str, ElasticSite], specs: Iterable[Mapping[str, int]], moments: bool) -> None:
    """Keeps compensated weights at the widths of specs, and second moments only if `moments`."""
    for spec in specs:
        for name, site in elastic.items():
            site.specialise(spec[name])
    if not moments:
        for site in elastic.values():
            site.release_moments()


def report_kept_moments(net: Any, incompatible: Any) -> None:
    """Says that `load_state_dict` brings weights only: what is known of the channels stays that of before."""
    if any(site.channel_mean.numel() for site in net.elastic.values()):
        print(
            "load_state_dict: means and moments of the channels stay as they were; if these are the weights of another "
            "network, call contract(loader) and stratify(loader) again, or use SuperNet.load",
            file=sys.stderr,
        )
