"""Where the sums of covariances are kept while images run, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from stratavit.calibration.accumulators import FLUSH, GramSum
from stratavit.choices import SumsPlace as SumsPlace
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.compensation import PackedMoments
from stratavit.elastic.network import sites_in
from stratavit.errors import StrataViTError, described
from stratavit.utils.model import model_device

SHARE = 0.5  # of free device memory; the rest is for activations, and for sites that are sorted
FOLDS = 2


@dataclass(frozen=True)
class SumsBytes:
    """Bytes of second moments, as `contract` holds them.

    Attributes:
        sums: Of all sites, while images run: of both folds.
        kept: Of the moments that contraction leaves on the modules, in float32: of all images, and of either fold.
        product: Of the largest site's product of one batch; all that a device holds of sums that are on the host.
        peak: Most of sums and moments at any time: those of a site take the place of its sums.
    """

    sums: int
    kept: int
    product: int
    peak: int


def known_place(memory: SumsPlace) -> SumsPlace:
    """The same; a `StrataViTError` if it is no such place."""
    if memory not in get_args(SumsPlace):
        raise StrataViTError(f"memory: expected 'auto', 'device' or 'host', got {described(memory)}")
    return memory


def count_bytes(sites: Iterable[ElasticSite], flushed: bool = False) -> SumsBytes:
    """How many bytes the second moments of sites are; their weights may be on the meta device.

    Args:
        sites: Elastic modules.
        flushed: There are so many batches that sums are moved to float64, too.
    """
    sums, kept, products = [0], [0], [0]
    for site in sites:
        n, each = site.out.weight.shape[1], site.out.weight.element_size()
        products.append(GramSum.size(n) * each)
        sums.append(FOLDS * GramSum.size(n) * (each + 8 * flushed))
        kept.append((n * n + FOLDS * PackedMoments.size(n)) * 4)
    return SumsBytes(sum(sums), sum(kept), max(products), sum(map(max, sums, kept)))


def on_host(model: nn.Module, loader: Iterable[Any], memory: SumsPlace) -> bool:
    """Whether sums go to the CPU: ``auto`` leaves them where the weights are if `SHARE` of the free memory is enough.

    Args:
        model: Its sites are elastic modules.
        loader: Tells the number of batches, if it can.
        memory: ``auto``, ``device`` or ``host``.
    """
    free = free_bytes(model_device(model)) if known_place(memory) == "auto" else None
    if free is None:
        return memory == "host"
    flushed = not isinstance(loader, Sized) or len(loader) > FLUSH
    return count_bytes(sites_in(model).values(), flushed).peak > SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a GPU, what torch has set aside and does not use included; None on other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)  # pragma: no cover: needs a GPU
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # pragma: no cover
