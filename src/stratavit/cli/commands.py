"""The commands around super-networks and small models: each has a function for its options and one for its work."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.model_loading import model_at
from stratavit.calibration.contraction import resolve_method
from stratavit.cli import options
from stratavit.cli.options import Outcome
from stratavit.data.splits import split_folder
from stratavit.dropout_list.joint import token_search
from stratavit.evaluation.curve_points import points_in
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.interop import supported
from stratavit.interop.export import SUFFIXES
from stratavit.interop.export import export as export_model
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import hub
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.text import human


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    check_free(args.out, args.overwrite)
    split_folder(args.data, "train")
    device = pick_device(args.device)
    net = SuperNet(model_at(args.model, args.weights, args.num_classes, device), embedding=args.embedding or None)
    method, _ = resolve_method(args.method, args.criterion)
    axes = ("width", "tokens") if args.axes == "both" else ("width",)
    token_search(axes, method, net.model, net.cost.places)  # refused before any work
    loader = options.loader_of(args, net.data_config, "train", net, args.images)
    started = time.perf_counter()
    net.contract(loader, args.method, args.criterion, args.objective, args.seed)
    setting = Setting(args.latency_batch, threads=args.threads)
    net.stratify(loader, objective=args.objective, seed=args.seed, price=args.price, setting=setting, axes=axes)
    seconds = time.perf_counter() - started
    weights = None if args.weights is None else Path(args.weights).name
    net.provenance["source"] = {"model": args.model, "weights": weights}
    net.save(args.out, args.overwrite, moments=not args.no_moments)
    assert net.strata is not None
    result = {
        "run": str(args.out),
        "images": net.provenance["contract"]["images"],
        "unreadable": len(loader.unreadable),
        "seconds": seconds,
        "macs": net.macs(),
        "params": net.params(),
        "smallest_macs": net.macs(net.strata.smallest()),
        "entries": len(net.strata),
        "moments_bytes": folder_format.moments_bytes(args.out),
    }
    text = (
        f"{args.model}: calibrated on {result['images']} images in {seconds:.0f} s; "
        f"any size from {human(result['smallest_macs'])} to {human(net.macs())} MACs is now a slice of {args.out} "
        f"({result['moments_bytes'] / 2**20:.3g} MiB of it are moments)"
    )
    return result, [text]


def extract(args: Namespace) -> Outcome:
    """RUN and a budget to a small model's folder."""
    check_free(args.out, args.overwrite)
    measured = args.latency_ms is not None or args.top1 is not None or args.max_drop is not None
    net = SuperNet.load(args.run, pick_device(args.device) if measured else "cpu")
    data = None if args.data is None else options.loader_of(args, net.data_config, "val", net)
    met = net.budget(**options.budgets(args), data=data, axes=args.axes)
    started = time.perf_counter()
    small = net.extract(spec=met.spec)
    seconds = time.perf_counter() - started
    sub_network.save(small, args.out, args.overwrite)
    macs, params = net.macs(met.spec), net.params(met.spec)
    result = {
        "small": str(args.out),
        "kind": met.kind,
        "asked": met.asked,
        "got": met.got,
        "reachable": [met.low, met.high],
        "bounds": [vars(bound) for bound in met.bounds],
        "macs": macs,
        "params": params,
        "position": met.position,
        "spec": dict(met.spec),
        "seconds": seconds,
    }
    text = f"wrote {args.out}: {human(macs)} MACs, {human(params)} parameters (sliced in {seconds:.2f} s)"
    if args.dtype not in (None, "float32"):
        text += f"; weights are saved as they were, cast them to {args.dtype} when you load them"
    return result, [str(met), text]


def export(args: Namespace) -> Outcome:
    """SMALL to one ONNX file, a torch.export program, or a folder of transformers."""
    file = Path(args.out or f"{str(args.small).rstrip('/')}{SUFFIXES[args.format]}")
    model: Any = sub_network.load(args.small, timm_form=True)
    images = None
    if args.data is not None:
        loader = options.loader_of(args, resolve_data_config(model), "val", model, args.images)
        images = torch.cat([batch for batch, _ in loader])
    parity = export_model(model, file, args.format, images, args.overwrite)
    return parity.to_dict(), [str(parity)]


def push(args: Namespace) -> Outcome:
    """SMALL or RUN to the hub, or to a folder that shows what would go there."""
    points = [] if args.curve is None else points_in(args.curve)
    shared: dict[str, Any] = {"points": points, "licence": args.license, "moments": not args.no_moments}
    if args.dry_run is not None:
        hub.write_upload(args.target, args.dry_run, args.repo, overwrite=args.overwrite, **shared)
        return {"folder": str(args.dry_run)}, [f"wrote {args.dry_run}: what would be uploaded to {args.repo}"]
    url = hub.push_to_hub(args.target, args.repo, private=args.private or None, endpoint=args.endpoint, **shared)
    return {"url": url}, [url]


def models(args: Namespace) -> Outcome:
    """Table of what can be cut, to what degree and why not more."""
    found = supported.rows(args.pattern)
    if args.markdown:
        return {"models": found}, [supported.markdown(found)]
    table = Table("models", "attention", "MLP", "why not more")
    for row in found:
        name = row["name"] if not row["models"] else f"{row['models']}\n{row['name']}"
        table.add_row(name, row["attention"], row["mlp"], row["reason"])
    return {"models": found}, [table]


def info(args: Namespace) -> Outcome:
    """What a saved folder holds."""
    kind = folder_format.kind(args.target)
    facts: dict[str, Any]
    if kind == folder_format.SUPER:
        net = SuperNet.load(args.target)
        provenance, config, widths = net.provenance, net.data_config, dict(net.resolve(None))
        facts = {
            "macs": net.macs(),
            "macs_with_attention": net.macs(attention=True),
            "params": net.params(),
            "smallest_macs": net.macs() if net.strata is None else net.macs(net.strata.smallest()),
            "method": net.method,
            "compensation": net.compensation,
            "moments_bytes": folder_format.moments_bytes(args.target),
            "entries": 0 if net.strata is None else len(net.strata),
        }
    else:
        model = sub_network.load(args.target, timm_form=True)
        provenance, config = dict(getattr(model, "provenance", {})), resolve_data_config(model)
        widths = sub_network.site_widths(model)
        facts = {"params": sum(p.numel() for p in model.parameters())}
        facts |= {key: provenance[key] for key in ("macs", "dense_macs", "dense_params") if key in provenance}
    rows = Table(title=f"{args.target}: {kind}")
    rows.add_column("site")
    rows.add_column("width", justify="right")
    for name, width in widths.items():
        rows.add_row(name, str(width))
    lines = [f"{key}: {human(value) if isinstance(value, int) else value}" for key, value in facts.items()]
    lines += [f"source: {provenance['source']}"] if "source" in provenance else []
    lines += [f"input: {config['input_size']}, mean {config['mean']}, std {config['std']}"]
    return {"kind": kind, **facts, "widths": widths, "data_config": config, "provenance": provenance}, [rows, *lines]


def demo(args: Namespace) -> Outcome:
    """The main job end to end on embedded images."""
    from stratavit.tasks.demo import run

    return run(Path(args.out or "stratavit-demo"), pick_device(args.device), args.epochs, args.overwrite)
