"""The work of the commands around super-networks and small models; their options are in `arguments`."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from stratavit.artifacts import folder_format, sub_network
from stratavit.budgets.amounts import GOALS, Budget
from stratavit.budgets.constraints import MEGABYTE
from stratavit.choices import CALIBRATED, COMPARED
from stratavit.cli import options
from stratavit.cli.checks import check_inputs, check_saved
from stratavit.cli.options import Outcome
from stratavit.cli.targets import saved_at, short_name
from stratavit.data.class_names import class_names_of
from stratavit.data.image_files import some
from stratavit.data.image_folder import ImageLoader
from stratavit.data.splits import find_split
from stratavit.data.unlabelled import images_in
from stratavit.dropout_list.floors import floors_of
from stratavit.errors import StrataViTError
from stratavit.evaluation.curve_points import points_in
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.interop import supported
from stratavit.interop.export import SUFFIXES, check_options, check_target
from stratavit.interop.export import export as export_model
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import hub
from stratavit.reports.curve import lists_in
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.text import human


def extract(args: Namespace) -> Outcome:
    """RUN and a budget to a small model's folder, or several amounts of one budget to as many folders."""
    folders = options.several(args)
    pick_device(args.device)
    check_saved(args.run, folder_format.SUPER)
    check_inputs(args, "val")
    for folder in folders:
        check_free(folder, args.overwrite)
    measured = args.latency_ms is not None or args.top1 is not None or args.max_drop is not None
    net = SuperNet.load(saved_at(args.run), pick_device(args.device) if measured else "cpu")
    data = None if args.data is None else options.loader_of(args, net.data_config, "val", net)
    _announce(args, net, data)
    met = [net.budget(**asked, data=data, axes=args.axes) for asked in folders.values()]  # all, or nothing is written
    made = [_sliced(net, one, folder, args) for one, folder in zip(met, folders, strict=True)]
    view = [line for _, lines in made for line in lines]
    return made[0][0] if len(made) == 1 else {"models": [result for result, _ in made]}, view


def _announce(args: Namespace, net: SuperNet, data: ImageLoader | None) -> None:
    """Says how much is measured, before it takes its time."""
    goals = [f"--{kind.replace('_', '-')}" for kind in GOALS if getattr(args, kind) is not None]
    if goals and data is not None and net.strata is not None:
        sizes = 2 + max(len(one) for one in lists_in(net).values()).bit_length()
        images = f"{len(data.chosen)} images each" + ("" if args.limit else " (--limit N: on fewer)")
        print(f"{' and '.join(goals)}: measures up to {sizes} sizes on {images}", file=sys.stderr)


def _sliced(net: SuperNet, met: Budget, folder: str, args: Namespace) -> Outcome:
    """Writes one small model."""
    started = time.perf_counter()
    small = net.extract(spec=met.spec, setting=Setting(dtype=args.dtype))
    seconds = time.perf_counter() - started
    sub_network.save(small, folder, args.overwrite)
    macs, params, weights = net.macs(met.spec), net.params(met.spec), list(small.parameters())
    result = {
        "small": folder,
        "kind": met.kind,
        "asked": met.asked,
        "got": met.got,
        "reachable": [met.low, met.high],
        "bounds": [vars(bound) for bound in met.bounds],
        "macs": macs,
        "macs_with_attention": net.macs(met.spec, attention=True),
        "params": params,
        "memory_mb": sum(weight.numel() * weight.element_size() for weight in weights) / MEGABYTE,
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "position": met.position,
        "axes": met.axes,
        "spec": dict(met.spec),
        "seconds": seconds,
    }
    size = f"{human(params)} parameters, {result['memory_mb']:.3g} MB in {result['dtype']}"
    return result, [str(met), f"wrote {folder}: {human(macs)} MACs, {size} (sliced in {seconds:.2f} s)"]


def export(args: Namespace) -> Outcome:
    """SMALL to one ONNX file, a torch.export program, or a folder of OpenVINO or transformers."""
    check_options(args.format, args.half, args.opset, args.int8, args.min_agreement)
    if args.int8 and args.data is None:
        raise StrataViTError("--int8 is calibrated on images: give --data DIR, a folder with some hundreds of them")
    check_saved(args.small, folder_format.SUB)
    if not args.int8:
        check_inputs(args, "val")
    file = Path(args.out or f"{short_name(args.small)}{'-int8' * args.int8}{SUFFIXES[args.format]}")
    check_target(file, args.format, args.overwrite)
    model: Any = sub_network.load(saved_at(args.small), timm_form=True).float()  # exact, whatever it was saved in
    images = None if args.data is None else _images_of(args, model)
    asked: dict[str, Any] = {name: getattr(args, name) for name in ("half", "opset", "int8", "min_agreement")}
    parity = export_model(model, file, args.format, images, args.overwrite, **asked)
    return parity.to_dict(), [str(parity)]


def _images_of(args: Namespace, model: nn.Module) -> torch.Tensor:
    """Images of ``--data``, to compare on; for int8 of its training split, if there is one."""
    config = resolve_data_config(model)
    if args.int8:
        folder = find_split(args.data, "train") or find_split(args.data, "val") or args.data
        return images_in(folder, model, config, args.images or CALIBRATED, max(args.workers, 0)).float()
    loader = options.loader_of(args, config, "val", model, args.images or COMPARED)
    return torch.cat([batch for batch, _ in loader])


def push(args: Namespace) -> Outcome:
    """SMALL or RUN to the hub, or to a folder that shows what would go there."""
    hub.check_names(args.repo, args.base_model)
    check_saved(args.target)
    points = [] if args.curve is None else points_in(args.curve)
    shared: dict[str, Any] = {"points": points, "licence": args.license, "base_model": args.base_model}
    shared["moments"] = not args.no_moments
    if args.dry_run is not None:
        check_free(args.dry_run, args.overwrite)
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
    check_saved(args.target)
    folder = saved_at(args.target)
    kind = folder_format.kind(folder)
    facts: dict[str, Any]
    model: Any
    if kind == folder_format.SUPER:
        model = net = SuperNet.load(folder)
        provenance, config, widths = net.provenance, net.data_config, dict(net.resolve(None))
        facts = {
            "macs": net.macs(),
            "macs_with_attention": net.macs(attention=True),
            "params": net.params(),
            "smallest_macs": net.macs() if net.strata is None else net.macs(net.strata.smallest()),
            "method": net.method,
            "compensation": net.compensation,
            "moments_bytes": folder_format.moments_bytes(folder),
            "entries": 0 if net.strata is None else len(net.strata),
            "joint_entries": 0 if net.joint_strata is None else len(net.joint_strata),
            "floors": floors_of((*net.sites, *net.cost.places)),
        }
        if net.joint_strata is not None:
            facts["joint_smallest_macs"] = net.macs(net.joint_strata.smallest())
            widths |= {place.name: place.width for place in net.cost.places}
    else:
        model = sub_network.load(folder, timm_form=True)
        provenance, config = dict(getattr(model, "provenance", {})), resolve_data_config(model)
        widths = sub_network.site_widths(model)
        facts = {"params": sum(p.numel() for p in model.parameters())}
        facts |= {key: provenance[key] for key in ("macs", "dense_macs", "dense_params") if key in provenance}
    rows = Table(title=f"{args.target}: {kind}")
    rows.add_column("site")
    rows.add_column("width", justify="right")
    floors = facts.get("floors", {})
    if floors:
        rows.add_column("always kept", justify="right")
    for name, width in (widths | floors).items():  # places that merge no tokens come last
        rows.add_row(name, str(widths.get(name, width)), *([str(floors.get(name, ""))] if floors else []))
    lines = [f"{k}: {human(value) if isinstance(value, int) else value}" for k, value in facts.items() if k != "floors"]
    lines += [f"source: {provenance['source']}"] if "source" in provenance else []
    names = class_names_of(model)
    lines += [f"classes: {len(names)} ({some(names)})"] if names else []
    lines += [f"input: {config['input_size']}, mean {config['mean']}, std {config['std']}"]
    about = {"widths": widths, "label_names": names, "data_config": config, "provenance": provenance}
    return {"kind": kind, **facts, **about}, [rows, *lines]


def demo(args: Namespace) -> Outcome:
    """The main job end to end on embedded images."""
    from stratavit.tasks.demo import run

    return run(Path(args.out or "stratavit-demo"), pick_device(args.device), args.epochs, args.overwrite)
