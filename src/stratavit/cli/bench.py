"""The command `bench`: what it times, and in which settings."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.artifacts import folder_format, sub_network
from stratavit.cli import options
from stratavit.cli.checks import check_saved
from stratavit.cli.targets import saved_at
from stratavit.errors import BudgetError
from stratavit.evaluation.benchmark import bench as time_models
from stratavit.evaluation.benchmark import tables
from stratavit.evaluation.curve_points import parse_share
from stratavit.evaluation.latency import Setting
from stratavit.models import architecture
from stratavit.models.cost import linear_macs
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.text import human

WIDTHS = ("head_dim", "qk_dim", "v_dim", "hidden_features")  # in the description of a site


def bench(args: Namespace) -> options.Outcome:
    """Times a small model, or sizes of a super-network, next to the dense model."""
    device = pick_device(args.device)
    asked = options.budgets(args)
    runtimes: Any = args.runtimes or ("eager", "onnx")
    notes: list[Any] = []
    if args.runtimes is None and args.dtype not in (None, "float32"):
        runtimes, notes = ("eager",), [f"ONNX Runtime is timed in float32 only, so not in {args.dtype}"]
    elif args.runtimes is None and not has_onnx():
        runtimes, notes = ("eager",), ["ONNX Runtime is not here: pip install 'stratavit[export]'"]
    settings = [Setting(n, r, args.dtype, args.threads, args.seconds) for r in runtimes for n in args.batches]
    check_saved(args.target)
    target = saved_at(args.target)
    if folder_format.kind(target) == folder_format.SUPER:
        net = SuperNet.load(target, device)
        size, models = net.data_config["input_size"], sizes(net, args.shares, asked)
    elif asked:
        raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
    else:
        small: Any = sub_network.load(target, device, timm_form=True)
        size, models = architecture.resolve_data_config(small)["input_size"], with_dense(small, Path(args.target).name)
    rows = time_models(models, size, settings)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": where, "rows": [vars(row) for row in rows]}, [*tables(rows, where), *notes]


def has_onnx() -> bool:
    """Whether the packages of the ONNX runtime are installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def sizes(net: SuperNet, shares: tuple[str, ...], asked: Any) -> dict[str, nn.Module]:
    """The dense model and the sub-networks of a super-network to time."""
    models = {"dense": net.extract(spec={}, verbose=False)}
    if asked:
        met = net.budget(**asked)
        models[f"{human(net.macs(met.spec))} MACs"] = net.extract(spec=met.spec)
        return models
    lowest = 1.0 if net.strata is None else net.macs(net.strata.smallest()) / net.macs()
    for share in shares:
        if lowest <= parse_share(share) < 1:
            models[share] = net.extract(macs=parse_share(share), verbose=False)
    if all(parse_share(share) < lowest for share in shares):
        raise BudgetError(f"none of the shares {', '.join(shares)} is reachable; the smallest is {lowest:.1%}")
    return models


def with_dense(small: nn.Module, name: str) -> dict[str, nn.Module]:
    """A small model and the dense one that it came from, with random weights: only its time matters.

    A module of which nothing is left is made like the nearest of its kind. The small model is alone where the dense one
    cannot be rebuilt: its origin is unknown, or a kind of module is cut out everywhere.
    """
    provenance = getattr(small, "provenance", {})
    if "dense_spec" not in provenance:
        return {name: small}
    description = architecture.describe(small)
    left, full, order = description["sites"], {}, list(provenance["dense_spec"])
    for place, (site, width) in enumerate(provenance["dense_spec"].items()):
        leaf = site.rpartition(".")[2]
        alike = [other for other, numbers in left.items() if other.endswith(leaf) and "constant" not in numbers]
        if not alike:
            return {name: small}
        nearest = min(alike, key=lambda other: abs(order.index(other) - place))
        full[site] = {key: width if key in WIDTHS else value for key, value in left[nearest].items()}
    dense = architecture.build({key: value for key, value in description.items() if key != "tokens"} | {"sites": full})
    size = architecture.resolve_data_config(small)["input_size"]
    if provenance.get("dense_macs") not in (None, linear_macs(dense, size)):
        return {name: small}
    parameter = next(small.parameters())
    return {"dense": dense.to(parameter.device, parameter.dtype).eval(), "small" if name == "dense" else name: small}
