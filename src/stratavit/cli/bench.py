"""The command `bench`: what it times, and in which settings."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.artifacts import folder_format, sub_network
from stratavit.cli.options import Outcome, budgeted, budgets
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluation.benchmark import bench, tables
from stratavit.evaluation.curve_points import parse_share
from stratavit.evaluation.latency import Runtime, Setting
from stratavit.models import architecture
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.text import human

RUNTIMES: tuple[Runtime, ...] = ("eager", "onnx")
BATCHES = (1, 64)


def run(args: Namespace) -> Outcome:
    """Times a small model, or sizes of a super-network, beside the dense model."""
    device = pick_device(args.device)
    asked = budgets(args)
    if folder_format.kind(args.target) == folder_format.SUPER:
        net = SuperNet.load(args.target, device)
        config = net.data_config
        models = sizes(net, args.shares, asked if budgeted(asked) else None)
    else:
        if budgeted(asked):
            raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
        small: Any = sub_network.load(args.target, device, timm_form=True)
        config = architecture.resolve_data_config(small)
        models = beside_dense(small, Path(args.target).name)
    notes = []
    runtimes = args.runtimes or RUNTIMES
    if args.runtimes is None and args.dtype not in (None, "float32"):
        runtimes, notes = ("eager",), [f"ONNX Runtime is timed in float32 only, so not in {args.dtype}"]
    elif args.runtimes is None and not has_onnx():
        runtimes, notes = ("eager",), ["ONNX Runtime is not here: pip install 'stratavit[export]'"]
    settings = [Setting(n, r, args.dtype, args.threads, args.seconds) for r in runtimes for n in args.batches]
    rows = bench(models, config["input_size"], settings)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": where, "rows": [row.to_dict() for row in rows]}, [*tables(rows, where), *notes]


def has_onnx() -> bool:
    """Whether the packages of the ONNX runtime are installed."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def sizes(net: SuperNet, shares: tuple[str, ...], asked: Any) -> dict[str, nn.Module]:
    """The dense model and the sub-networks of a super-network to time."""
    models = {"dense": net.extract(spec={}, verbose=False)}
    if asked is not None:
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


def beside_dense(small: nn.Module, name: str) -> dict[str, nn.Module]:
    """A small model and the dense one that it came from, with random weights: only its time matters."""
    dense_spec = getattr(small, "provenance", {}).get("dense_spec")
    if dense_spec is None:
        return {name: small}
    description = architecture.describe(small)
    try:
        description["sites"] |= dense_sites(description["sites"], dense_spec)
        dense = architecture.build(description)
    except (StrataViTError, KeyError, TypeError, AttributeError) as error:
        raise StrataViTError(f"bench: the dense model cannot be built from the provenance of {name}") from error
    parameter = next(small.parameters())
    return {"dense": dense.to(parameter.device, parameter.dtype).eval(), "small" if name == "dense" else name: small}


def dense_sites(sites: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """The description of every site at full width; of a constant one like others of its kind."""
    found: dict[str, Any] = {}
    for name, width in widths.items():
        leaf = name.rpartition(".")[2]
        alike = [site for other, site in sites.items() if other.endswith(leaf) and "constant" not in site]
        usual = {"num_heads": 1, "qkv_bias": True, "proj_bias": True}
        usual = usual if leaf == "attn" else {"fc1_bias": True, "fc2_bias": True}
        like = sites[name] if "constant" not in sites[name] else (alike or [usual])[0]
        found[name] = {**like, ("head_dim" if leaf == "attn" else "hidden_features"): width}
    return found
