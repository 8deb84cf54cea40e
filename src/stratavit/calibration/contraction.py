"""The first step of a conversion: channels are sorted inside every module, the function is kept. No training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stratavit.calibration.accumulators import wide
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.elimination import elimination_order
from stratavit.calibration.head_order import head_order
from stratavit.calibration.moments import Draft, draft, keep_drafts, map_products, moved_mean
from stratavit.calibration.objectives import Objective
from stratavit.calibration.output_aware import output_axes
from stratavit.calibration.site_observer import SiteObserver
from stratavit.calibration.statistics import observe
from stratavit.calibration.sums_place import SumsPlace, known_place, on_host
from stratavit.calibration.wpac import (
    CRITERIA,
    Criterion,
    attention_transform,
    mlp_order,
    principal_axes,
    scatter_needed,
)
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.exchanged import AttentionTransform
from stratavit.elastic.network import site_of, sites_in
from stratavit.elastic.rotary import ElasticRotary, order_of_pairs
from stratavit.errors import StrataViTError, described
from stratavit.models.families import layer_scale
from stratavit.utils.freed_memory import give_back
from stratavit.utils.model import full_products
from stratavit.utils.progress import track

Method = Literal["default", "paper"]
TOKEN_WEIGHT = 0.5
HOST_BYTES, DEVICE_BYTES = 2**27, 2**30  # of covariances and maps of sites that are sorted together


def known_method(method: Method) -> Method:
    """The same; a `StrataViTError` if it is neither of the two."""
    if method not in get_args(Method):
        raise StrataViTError(f"method: expected 'default' or 'paper', got {described(method)}")
    return method


def resolve_method(method: Method | None, criterion: Criterion | None) -> tuple[Method, Criterion]:
    """The method and the criterion that go together, where one or both are left out.

    Raises:
        StrataViTError: One is unknown, or they belong to different methods.
    """
    if criterion is not None and criterion not in CRITERIA:
        raise StrataViTError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    implied: Method = "default" if criterion in (None, "output") else "paper"
    method = implied if method is None else known_method(method)
    if criterion is not None and method != implied:
        raise StrataViTError(f"criterion {criterion!r} belongs to method={implied!r}, got method={method!r}")
    return method, criterion or ("output" if method == "default" else "wpac")


def sort_channels(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: Criterion,
    objective: Objective,
    seed: int,
    token_weight: float,
    memory: SumsPlace = "auto",
) -> tuple[dict[str, Any], DenseOutputs | None]:
    """Sorts the channels of every site in place, from one pass over the calibration images.

    Args:
        model, loader, objective: See `statistics.collect`.
        criterion: What channels are sorted by.
        seed: For ``random`` and for the objective ``sampled``.
        token_weight: For ``output``: share of a token's weight that follows the gradient norm at the module's output.
        memory: For ``output``: where the sums of covariances are kept, see `sums_place.on_host`.

    Returns:
        Facts for the provenance; with ``output`` the dense model's outputs, which the pass computes anyway.

    Raises:
        StrataViTError: Bad images, labels or options.
    """
    known_place(memory)
    if not 0 <= token_weight <= 1:
        raise StrataViTError(f"token_weight: expected a share from 0 to 1, got {token_weight!r}")
    if any(module.delta is not None for module in sites_in(model).values()):
        raise StrataViTError(
            "contract: recovery has changed the sizes of this network; begin with SuperNet(net.extract(spec={}))"
        )
    if criterion != "output" and any(module.whole_heads for module in sites_in(model).values()):
        raise StrataViTError("method: the paper's cuts inside heads; for whole heads leave the method at its default")
    share = token_weight if criterion == "output" else None
    dense_outputs = None if share is None else DenseOutputs()
    asked = (objective, scatter_needed(criterion), "contract", share, seed, dense_outputs)
    host = share is not None and on_host(model, loader, memory)
    observers, images = observe(model, loader, *asked, host=host)
    give_back()  # what the activations took
    sort_sites(model, observers, criterion, seed)
    facts = {"criterion": criterion, "objective": objective, "images": images, "seed": seed, "token_weight": share}
    facts |= {"sums_on_host": host} if host else {}
    return facts, dense_outputs


def sort_sites(model: nn.Module, observers: dict[str, SiteObserver], criterion: Criterion, seed: int = 0) -> None:
    """Sorts the channels of the sites that were observed, in place.

    Args:
        model: Its sites are elastic modules.
        observers: Of `statistics.observe`; used up.
        criterion, seed: See `sort_channels`.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = {name: site_of(model, name) for name in observers}
    for names in track(_alike(sites) if criterion == "output" else [[name] for name in sites], "sort channels"):
        chosen, watched = [sites[name] for name in names], [observers.pop(name) for name in names]
        with full_products():
            _sort_alike(chosen, watched, criterion, [layer_scale(model, name) for name in names], generator)
        del watched
        give_back()  # their sums


def _alike(sites: Mapping[str, ElasticSite]) -> list[list[str]]:
    """Names of sites of one shape together, as many as may be worked on at once."""
    shapes: dict[Any, list[str]] = {}
    for name, site in sites.items():
        shapes.setdefault((site.attention, site.tied, site.heads, site.out.weight.shape), []).append(name)
    groups = []
    for names in shapes.values():
        weight = sites[names[0]].out.weight
        size = weight.itemsize * weight.shape[1] * sum(weight.shape)  # bytes of covariance and map
        most = max(1, (HOST_BYTES if weight.device.type == "cpu" else DEVICE_BYTES) // size)
        groups += [names[start : start + most] for start in range(0, len(names), most)]
    return groups


@torch.no_grad()
def _sort_alike(
    modules: Sequence[ElasticSite],
    observers: Sequence[SiteObserver],
    criterion: Criterion,
    scales: Sequence[Tensor | None],
    generator: torch.Generator,
) -> None:
    """Folds new coordinates into the weights of sites of one shape, and keeps means and moments in these.

    Args:
        modules: The sites; more than one only for the criterion ``output``.
        observers: What was seen of each.
        criterion: What channels are sorted by.
        scales: Their LayerScale.
        generator: For ``random``.
    """
    coordinates: list[AttentionTransform | Tensor]
    if criterion == "output":
        coordinates = _output_coordinates(modules, observers, scales)
    else:
        choose = attention_transform if modules[0].attention else mlp_order
        coordinates = [choose(observers[0].result(), criterion, modules[0].norms(), generator)]
    give_back()  # what is left of the table
    sites = zip(modules, observers, coordinates, strict=True)
    keep_drafts(modules, [_sort_site(module, observer, new) for module, observer, new in sites])


def _sort_site(module: ElasticSite, observer: SiteObserver, new: AttentionTransform | Tensor) -> list[Draft]:
    """Folds an attention module's transform, or the order ``[m]`` of an MLP's channels, into the weights.

    Returns:
        Its moments of all images, without fold 0 and without fold 1; none where no covariance was asked for.
    """
    module.forget()
    products = map_products(module) if observer.has_covariance else None
    if isinstance(new, AttentionTransform):
        module.fold(new)
        new = new.v
        if isinstance(module, ElasticRotary) and observer.pair_sums is not None:
            module.pairs = order_of_pairs(observer.pair_sums).to(module.pairs.device)
    else:
        module.permute(new)
    if products is None:
        mean = observer.result().channel_mean
        set_mean(module, moved_mean(new.to(mean.device), mean))
        return []
    drafts = [draft(module, observer, new, folds, products) for folds in ((0, 1), (1,), (0,))]
    set_mean(module, drafts[0].mean)
    return drafts


class _Covariances:
    """Covariances of the channels that sites read, made one after the other each time they are gone through."""

    def __init__(self, observers: Sequence[SiteObserver]) -> None:
        self._observers = observers

    def __iter__(self) -> Iterator[Tensor]:
        return (observer.covariance() for observer in self._observers)


def _output_coordinates(
    modules: Sequence[ElasticSite], observers: Sequence[SiteObserver], scales: Sequence[Tensor | None]
) -> list[AttentionTransform | Tensor]:
    """What the criterion ``output`` chooses for sites of one shape."""
    maps = map(_scaled_map, modules, scales)  # one at a time, as they are in float64
    if modules[0].whole_heads:
        return [head_order(own, found) for own, found in zip(maps, _Covariances(observers), strict=True)]
    if not modules[0].attention:
        columns = torch.stack([own.flatten(1).to(modules[0].out.weight.dtype) for own in maps])  # [S, C, m]
        return list(elimination_order(columns, _Covariances(observers)))
    weight = torch.stack(list(maps))  # [S, C, H, d]
    blocks = [_own_blocks(observer.covariance(), weight.shape[2]).clone() for observer in observers]  # [H, d, d]
    values = output_axes(weight.transpose(1, 2), torch.stack(blocks))
    scatters = [found.sum(dim=0) for found in map(SiteObserver.scatter, observers) if found is not None]
    turns = principal_axes(torch.stack(scatters)).mT if scatters else [None] * len(modules)  # [S, H, d, d]
    return [AttentionTransform(qk, qk, v, o) for qk, v, o in zip(turns, *values, strict=True)]


def _scaled_map(module: ElasticSite, scale: Tensor | None) -> Tensor:
    """The map that reads a site's channels, times its LayerScale, ``[C, H, d]`` float64."""
    weight = wide(module.out_by_head().detach())
    return weight if scale is None else weight * wide(scale.detach())[:, None, None]


def _own_blocks(covariance: Tensor, heads: int) -> Tensor:
    """The covariance of each head's own channels ``[H, d, d]``, of that of all, ``[H*d, H*d]``."""
    return covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def set_mean(module: ElasticSite, mean: Tensor) -> None:
    """Gives a module the mean of the channels that its `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``."""
    module.channel_mean = mean.to(module.out.weight)
