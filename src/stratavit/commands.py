"""What each command of the command line does. Returns plain data for ``--json`` and a view for people."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from stratavit import artifacts, hub, report
from stratavit.architecture import resolve_data_config
from stratavit.budget import human
from stratavit.data import image_loader
from stratavit.devices import pick_device
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluate import evaluate as evaluate_model
from stratavit.export import SUFFIXES
from stratavit.export import export as export_model
from stratavit.folders import check_free, write_folder
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.timing import Runtime, Setting
from stratavit.zoo import model_at

Outcome = tuple[dict[str, Any], list[Any]]


def default_workers() -> int:
    """Image-loading processes: one per core, four at most."""
    return min(4, os.cpu_count() or 1)


def _loader(args: Namespace, data_config: dict[str, Any], split: str, classes: int, limit: int | None = None) -> Any:
    workers = max(args.workers, 0)
    return image_loader(args.data, data_config, split, classes, args.class_map, args.batch_size, workers, limit)


def budgets(args: Namespace) -> Any:
    """The budgets that the command line takes, and how latency is timed."""
    kinds = ("macs", "params", "memory_mb", "latency_ms", "position", "top1", "max_drop")
    batch, runtime = getattr(args, "latency_batch", 1), getattr(args, "runtime", "eager")
    setting = Setting(batch_size=batch, runtime=cast(Runtime, runtime), dtype=args.dtype, threads=args.threads)
    return {kind: getattr(args, kind, None) for kind in kinds} | {"setting": setting}


def budgeted(asked: Any) -> bool:
    """Whether the command line gave a budget."""
    return any(value is not None for kind, value in asked.items() if kind != "setting")


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    check_free(args.out, args.overwrite)
    device = pick_device(args.device)
    net = SuperNet(model_at(args.model, args.weights, args.num_classes, device))
    loader = _loader(args, net.data_config, "train", net.model.num_classes, args.images)
    started = time.perf_counter()
    net.contract(loader, args.method, args.criterion, args.objective, args.seed)
    setting = Setting(args.latency_batch, threads=args.threads)
    net.stratify(loader, objective=args.objective, seed=args.seed, price=args.price, setting=setting)
    seconds = time.perf_counter() - started
    net.provenance["source"] = {
        "model": args.model,
        "weights": None if args.weights is None else Path(args.weights).name,
    }
    net.save(args.out, args.overwrite, moments=not args.no_moments)
    assert net.strata is not None
    smallest = net.strata.spec(len(net.strata))
    result = {
        "run": str(args.out),
        "images": net.provenance["contract"]["images"],
        "unreadable": len(loader.unreadable),
        "seconds": seconds,
        "macs": net.macs(),
        "params": net.params(),
        "smallest_macs": net.macs(smallest),
        "entries": len(net.strata),
        "moments_bytes": artifacts.moments_bytes(args.out),
    }
    text = (
        f"{args.model}: calibrated on {result['images']} images in {seconds:.0f} s; "
        f"any size from {human(net.macs(smallest))} to {human(net.macs())} MACs is now a slice of {args.out} "
        f"({result['moments_bytes'] / 2**20:.3g} MiB of it are moments)"
    )
    return result, [text]


def extract(args: Namespace) -> Outcome:
    """RUN and a budget to a small model's folder."""
    check_free(args.out, args.overwrite)
    measured = args.latency_ms is not None or args.top1 is not None or args.max_drop is not None
    net = SuperNet.load(args.run, pick_device(args.device) if measured else "cpu")
    data = None if args.data is None else _loader(args, net.data_config, "val", net.model.num_classes)
    met = net.budget(**budgets(args), data=data)
    started = time.perf_counter()
    small = net.extract(spec=met.spec)
    seconds = time.perf_counter() - started
    artifacts.save(small, args.out, args.overwrite)
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


def evaluate(args: Namespace) -> Outcome:
    """Accuracy of a saved folder or a timm model."""
    device = pick_device(args.device)
    asked = budgets(args)
    spec: Spec | None = None
    view: list[Any] = []
    model: nn.Module
    if Path(args.target).is_dir() and artifacts.kind(args.target) == artifacts.SUPER:
        model = net = SuperNet.load(args.target, device)
        if budgeted(asked):
            met = net.budget(**asked)
            spec, view = met.spec, [str(met)]
        config, classes = net.data_config, net.model.num_classes
    else:
        model = model_at(args.target, args.weights, args.num_classes, device)
        config, classes = resolve_data_config(model), model.num_classes
    if budgeted(asked) and spec is None:
        raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
    loader = _loader(args, config, "val", classes)
    metrics = evaluate_model(model, loader, spec)
    return metrics.to_dict() | {"unreadable": len(loader.unreadable)}, [*view, str(metrics)]


def curve(args: Namespace) -> Outcome:
    """Table, CSV and PNG of accuracy against size."""
    out = args.out or f"{str(args.run).rstrip('/')}-curve"
    check_free(out, args.overwrite)
    net = SuperNet.load(args.run, pick_device(args.device))
    loader = _loader(args, net.data_config, "val", net.model.num_classes)
    points = report.curve(net, loader, args.shares)
    if not points:
        raise BudgetError(
            f"none of the shares {', '.join(args.shares)} is reachable; `stratavit info {args.run}` tells the range"
        )
    source = net.provenance.get("source", {}).get("model", net.description["architecture"])
    write_curve(points, out, f"{source}, {net.method} method", args.overwrite)
    return {"points": [vars(point) for point in points], "folder": str(out)}, [
        report.table(points),
        f"wrote {out}/curve.csv and curve.png",
    ]


def export(args: Namespace) -> Outcome:
    """SMALL to one ONNX file or torch.export program."""
    file = Path(args.out or f"{str(args.small).rstrip('/')}{SUFFIXES[args.format]}")
    model: Any = artifacts.load(args.small)
    images = None
    if args.data is not None:
        loader = _loader(args, resolve_data_config(model), "val", model.num_classes, args.images)
        images = torch.cat([batch for batch, _ in loader])
    parity = export_model(model, file, args.format, images, args.overwrite)
    return parity.to_dict(), [str(parity)]


def push(args: Namespace) -> Outcome:
    """SMALL or RUN to the hub, or to a folder that shows what would go there."""
    points = report.read_csv(Path(args.curve) / "curve.csv") if args.curve is not None else []
    if args.curve is not None and not points:
        raise StrataViTError(f"{args.curve} holds no curve.csv; make one with `stratavit curve`")
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


def write_curve(points: list[report.Point], out: str | Path, title: str, overwrite: bool) -> None:
    """Writes ``curve.csv`` and ``curve.png`` to a folder."""

    def write(folder: Path) -> None:
        report.write_csv(points, folder / "curve.csv")
        report.plot(points, folder / "curve.png", title)

    write_folder(out, write, overwrite)


def info(args: Namespace) -> Outcome:
    """What a saved folder holds."""
    kind = artifacts.kind(args.target)
    if kind == artifacts.SUPER:
        net = SuperNet.load(args.target)
        widths = dict(net.resolve(None))
        smallest = net.macs() if net.strata is None else net.macs(net.strata.spec(len(net.strata)))
        facts: dict[str, Any] = {
            "macs": net.macs(),
            "macs_with_attention": net.macs(attention=True),
            "params": net.params(),
        }
        facts |= {
            "smallest_macs": smallest,
            "method": net.method,
            "compensation": net.compensation,
            "moments_bytes": artifacts.moments_bytes(args.target),
            "entries": 0 if net.strata is None else len(net.strata),
        }
        provenance, config = net.provenance, net.data_config
    else:
        model = artifacts.load(args.target)
        provenance, config = dict(getattr(model, "provenance", {})), resolve_data_config(model)
        widths = artifacts.site_widths(model)
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
