"""What each command of the command line does. Returns plain data for ``--json`` and a view for people."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from stratavit.artifacts import folder_format, sub_network
from stratavit.cli.options import Outcome, budgets, loader_of
from stratavit.data.class_names import class_names_of
from stratavit.evaluation import curve_points
from stratavit.files.folders import check_free
from stratavit.interop.export import SUFFIXES
from stratavit.interop.export import export as export_model
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import hub
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of
from stratavit.utils.text import human


def extract(args: Namespace) -> Outcome:
    """RUN and a budget to a small model's folder."""
    check_free(args.out, args.overwrite)
    measured = args.latency_ms is not None or args.top1 is not None or args.max_drop is not None
    net = SuperNet.load(args.run, pick_device(args.device) if measured else "cpu")
    data = (
        None
        if args.data is None
        else loader_of(args, net.data_config, "val", classes_of(net), None, class_names_of(net))
    )
    met = net.budget(**budgets(args), data=data)
    started = time.perf_counter()
    small = net.extract(spec=met.spec)
    seconds = time.perf_counter() - started
    sub_network.save(small, args.out, args.overwrite)
    size = {"macs": net.macs(met.spec), "params": net.params(met.spec)}
    result = {
        "small": str(args.out),
        "kind": met.kind,
        "asked": met.asked,
        "got": met.got,
        "reachable": [met.low, met.high],
        "bounds": [vars(bound) for bound in met.bounds],
    }
    result |= size | {"position": met.position, "spec": dict(met.spec), "seconds": seconds}
    text = (
        f"wrote {args.out}: {human(size['macs'])} MACs, {human(size['params'])} parameters (sliced in {seconds:.2f} s)"
    )
    if args.dtype not in (None, "float32"):
        text += f"; weights are saved as they were, cast them to {args.dtype} when you load them"
    return result, [str(met), text]


def export(args: Namespace) -> Outcome:
    """SMALL to one ONNX file, a torch.export program, or a folder of transformers."""
    file = Path(args.out or f"{str(args.small).rstrip('/')}{SUFFIXES[args.format]}")
    model: Any = sub_network.load(args.small, timm_form=True)
    images = None
    if args.data is not None:
        names = class_names_of(model)
        loader = loader_of(args, resolve_data_config(model), "val", classes_of(model), args.images, names)
        images = torch.cat([batch for batch, _ in loader])
    parity = export_model(model, file, args.format, images, args.overwrite)
    return parity.to_dict(), [str(parity)]


def push(args: Namespace) -> Outcome:
    """SMALL or RUN to the hub, or to a folder that shows what would go there."""
    points = curve_points.points_in(args.curve) if args.curve is not None else []
    if args.dry_run is not None:
        hub.write_upload(
            args.target, args.dry_run, args.repo, points, args.license, not args.no_moments, args.overwrite
        )
        return {"folder": str(args.dry_run)}, [f"wrote {args.dry_run}: what would be uploaded to {args.repo}"]
    url = hub.push_to_hub(
        args.target,
        args.repo,
        points=points,
        licence=args.license,
        moments=not args.no_moments,
        private=args.private or None,
        endpoint=args.endpoint,
    )
    return {"url": url}, [url]


def info(args: Namespace) -> Outcome:
    """What a saved folder holds."""
    kind = folder_format.kind(args.target)
    if kind == folder_format.SUPER:
        net = SuperNet.load(args.target)
        widths = dict(net.resolve(None))
        smallest = net.macs() if net.strata is None else net.macs(net.strata.smallest())
        facts: dict[str, Any] = {
            "macs": net.macs(),
            "macs_with_attention": net.macs(attention=True),
            "params": net.params(),
        }
        facts |= {
            "smallest_macs": smallest,
            "method": net.method,
            "compensation": net.compensation,
            "moments_bytes": folder_format.moments_bytes(args.target),
            "entries": 0 if net.strata is None else len(net.strata),
        }
        provenance, config = net.provenance, net.data_config
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
    from stratavit.demo import run

    return run(Path(args.out or "stratavit-demo"), pick_device(args.device), args.epochs, args.overwrite)
