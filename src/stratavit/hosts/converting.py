"""From a host and batches to the super-network of one of its parts, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratavit.dropout_list.floors import MinWidth
from stratavit.dropout_list.walk import Walk
from stratavit.errors import StrataViTError
from stratavit.hosts.calls import Call, outputs_read, record_calls, run_host
from stratavit.hosts.finding import find_part
from stratavit.hosts.part_net import PartNet
from stratavit.interop.timm_equivalent import COARSE
from stratavit.utils.model import eval_mode, full_products, model_dtype

LIMIT = 1024  # images, as in the paper
UNCUT = 1e-4  # of the largest output of the host, with the part converted and not cut, in float32


def convert_part(
    model: nn.Module,
    part: str,
    loader: Iterable[Any],
    *,
    call: Call | None = None,
    limit: int = LIMIT,
    seed: int = 0,
    plan: Walk | None = None,
    ignore: Any = None,
    min_width: MinWidth | None = None,
) -> PartNet:
    """Makes the super-network of a ViT inside a larger model, from that model's own forward pass; no training.

    The model runs on the batches as it is. What it gives to its part, and which tensors of the part's output it reads,
    is recorded; the part is then calibrated on that. The list aims at the relative squared error of what is read.

    Args:
        model: The host: of transformers, or any other module; it is not changed.
        part: Name of the part in it (``vision_tower``, ``backbone``); empty for the model itself.
        loader: Batches that the host takes: mappings of its arguments, images, or ``(images, labels)``.
        call: How to run the host on a batch, ``call(model, batch)``, if not as above; it moves what must be on the
            model's device.
        limit: At most about this many images, the first.
        seed, plan, ignore, min_width: See `SuperNet.stratify`.

    Returns:
        The super-network of the part; `PartNet.place` puts a size of it into the host.

    Raises:
        UnsupportedModelError: There is no such part (those that could be meant are named), or it cannot be cut.
        StrataViTError: The host fails on a batch, does not run the part, or an option does not fit.
    """
    if not isinstance(limit, int) or limit < 1:
        raise StrataViTError(f"limit: expected a whole number of at least 1, got {limit!r}")
    name = find_part(model, part)
    module = model.get_submodule(name)
    calls, first = record_calls(model, module, name or "the model", loader, call, limit)
    net = PartNet(model, name, calls, outputs_read(model, module, first, call, calls.first, calls.packed))
    _check_repeatable(net, calls.batches[0])
    net.contract(calls.batches, seed=seed)
    net.stratify(calls.batches, plan=plan, seed=seed, ignore=ignore, min_width=min_width)
    if name:
        _check_uncut(net, first, call)
    return net


def _check_repeatable(net: PartNet, images: Tensor) -> None:
    """Refuses a part that draws random numbers in eval mode."""
    images = images[:2].to(next(net.parameters()))
    with eval_mode(net), torch.no_grad():
        if not torch.equal(net(images), net(images)):
            raise StrataViTError(
                f"{net.name or 'the model'} computes something else each time that it runs; give it what it draws, for "
                "example the noise of masks, in the batches"
            )


def _check_uncut(net: PartNet, batch: Any, call: Call | None) -> None:
    """Whether the host computes the same with its part converted and not cut.

    Raises:
        StrataViTError: It does not.
    """
    found = uncut_error(net, batch, call)
    coarse = model_dtype(net.host) not in (torch.float32, torch.float64)
    if not found <= (COARSE if coarse else UNCUT):
        raise StrataViTError(
            f"the outputs of the host differ by {found:.1e} of the largest with {net.name} converted and not cut; "
            "something in it reads weights that were changed; please report its class"
        )


def uncut_error(net: PartNet, batch: Any, call: Call | None = None) -> float:
    """Largest difference of the host's outputs with the part converted and not cut, over the largest output.

    Args:
        net: Of `convert_part`.
        batch: One of the batches that the host takes.
        call: See `convert_part`.
    """
    host, now = net.host, net.host.get_submodule(net.name)
    try:
        host.set_submodule(net.name, net._host[1])
        expected = host_outputs(host, batch, call)
        host.set_submodule(net.name, net.small_at({}))
        found = host_outputs(host, batch, call)
    finally:
        host.set_submodule(net.name, now)
    pairs = zip(found, expected, strict=True)
    return max(float((f - e).abs().max() / e.abs().max().clamp_min(1e-6)) for f, e in pairs)


def host_outputs(host: nn.Module, batch: Any, call: Call | None = None) -> list[Tensor]:
    """The floating tensors in a host's output for a batch, in float32."""
    with eval_mode(host), torch.no_grad(), full_products():
        leaves = tree_leaves(run_host(host, batch, call))
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
