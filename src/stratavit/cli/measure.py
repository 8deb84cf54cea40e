"""The commands that measure accuracy: ``evaluate``, ``curve`` and, with images, ``report``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.budgets.amounts import Budget
from stratavit.cli import options
from stratavit.cli.checks import check_inputs, check_model, check_saved, check_typed
from stratavit.cli.options import Outcome
from stratavit.cli.targets import model_named, saved_at, short_name
from stratavit.data.class_names import full_names, read_class_map
from stratavit.data.image_folder import ImageLoader
from stratavit.data.shared_images import report_shared_images
from stratavit.data.splits import split_folder
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluation import curve_points, prediction
from stratavit.evaluation.accuracy import evaluate as evaluate_model
from stratavit.evaluation.dense_check import near_chance
from stratavit.evaluation.features import knn, read_embeddings
from stratavit.evaluation.latency import Setting
from stratavit.evaluation.output_agreement import compare_outputs
from stratavit.evaluation.prediction import image_paths
from stratavit.evaluation.probe import linear_probe
from stratavit.files.folders import check_free, check_free_file, write_folder
from stratavit.interop.exported_model import ExportedModel, exported_model, is_exported
from stratavit.models.architecture import resolve_data_config
from stratavit.models.cost import linear_macs
from stratavit.reports import curve as curves
from stratavit.reports import plots
from stratavit.reports.html import list_shown, write_report
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of, model_device


def judge_and_images(args: Namespace, model: nn.Module, config: dict[str, Any]) -> tuple[curves.Judge, ImageLoader]:
    """How a model is measured, as `add_judge` lets one choose, and on what; see `_judge_and_images` for errors."""
    judge, images = _judge_and_images(args, model, config)
    return judge if args.precision == "no" else _autocast(args, model)(judge), images


def _autocast(args: Namespace, model: nn.Module) -> torch.autocast:
    """The mixed precision that is asked for."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(model_device(model).type, dtype, enabled=args.precision != "no")


def _judge_and_images(args: Namespace, model: nn.Module, config: dict[str, Any]) -> tuple[curves.Judge, ImageLoader]:
    """The same in the model's own precision.

    Raises:
        StrataViTError: The images do not suit the way that is asked for.
    """
    if args.zero_shot is not None:
        embeddings = read_embeddings(args.zero_shot)
        images = options.loader_of(args, config, "val", classes=len(embeddings))
        return curves.judge_of(model, embeddings=embeddings), images
    if args.knn is None and args.probe is None:
        return evaluate_model, options.loader_of(args, config, "val", model)
    way = "--knn" if args.probe is None else "--probe"
    if split_folder(args.data, "train") == split_folder(args.data, "val"):
        raise StrataViTError(
            f"data: {args.data} has no train/ and val/; {way} compares the images of val/ with those of train/, and "
            "images that are in both would find themselves"
        )
    bank, images = (options.loader_of(args, config, split) for split in ("train", "val"))
    report_shared_images(images, args.data, "train")
    if args.probe is not None:
        return lambda model, loader, spec=None, description="linear probe": linear_probe(
            model, bank, loader, spec, None if args.probe is True else args.probe, description
        ), images
    return lambda model, loader, spec=None, description="nearest neighbours": knn(
        model, bank, loader, spec, args.knn, description=description
    ), images


def evaluate(args: Namespace) -> Outcome:
    """Accuracy of a saved folder, an ONNX file or a timm model."""
    check_typed(args)
    check_model(args.target, asked=bool(options.budgets(args)))
    check_inputs(args, "val")
    model, config, met = asked_for(args)
    judge, images = judge_and_images(args, model, config)
    result: dict[str, Any] = {"model": str(args.target), "budget": [] if met is None else list(map(vars, met.bounds))}
    result |= {} if met is None else {"axes": met.axes}
    view = [] if met is None else [str(met)]
    spec = None if met is None else met.spec
    result |= _size(model, config, spec) if args.json else {}  # counted in a pass over an image
    if not args.agreement or classes_of(model) or not _by_head(args):
        metrics = judge(model, images, spec, description="evaluate")
        _warn_near_chance(args, model, metrics.top1, metrics.n)
        result, view = result | metrics.to_dict(), [*view, str(metrics)]
    if args.agreement:
        with _autocast(args, model):
            found = compare_outputs(model, model, images, spec)
        result, view = result | {"agreement": found.to_dict()}, [*view, str(found)]
    return result | {"unreadable": len(images.unreadable)}, view


def _size(model: nn.Module, config: dict[str, Any], spec: Spec | None) -> dict[str, int]:
    """MACs and parameters of what is measured; nothing of an exported file."""
    if isinstance(model, SuperNet):
        return {"macs": model.macs(spec), "params": model.params(spec)}
    if isinstance(model, ExportedModel):
        return {}
    return {
        "macs": linear_macs(model, tuple(config["input_size"])),
        "params": sum(p.numel() for p in model.parameters()),
    }


def _by_head(args: Namespace) -> bool:
    """Whether accuracy is that of the classes of the head."""
    return args.knn is None and args.probe is None and args.zero_shot is None


def _warn_near_chance(args: Namespace, model: nn.Module, top1: float, images: int) -> None:
    """Says so on standard error where the classes of the head are measured and are no better than guessing."""
    classes = classes_of(model) if _by_head(args) else 0
    if classes and near_chance(top1 / 100, images, classes):
        print(
            f"data: warning: top-1 {top1:.2f} % is near chance ({100 / classes:.2g} %): is the model so small, or are "
            "the classes not in the order of its head (--class-map)?",
            file=sys.stderr,
        )


def asked_for(args: Namespace) -> tuple[nn.Module, dict[str, Any], Budget | None]:
    """A model by folder, file or name, how its images are prepared, and the size of it that is asked for.

    Raises:
        BudgetError: It has one size only.
    """
    device, asked, target = pick_device(args.device), options.budgets(args), model_named(args.target)
    if folder_format.is_supernet(target):
        net = SuperNet.load(target, device)
        return net, net.data_config, net.budget(**asked) if asked else None
    if asked:
        raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
    if is_exported(target):
        file = exported_model(target)
        return file, file.data_config, None
    model = model_at(target, args.weights, args.num_classes, device)
    return model, resolve_data_config(model), None


def predict(args: Namespace) -> Outcome:
    """The most likely classes of a few images, by name."""
    check_typed(args)
    check_model(args.target, asked=bool(options.budgets(args)))
    check_inputs(args)
    paths = image_paths(args.images)
    names = None if args.class_map is None else full_names([*read_class_map(Path(args.class_map))])
    model, config, met = asked_for(args)
    found = prediction.predict(model, paths, config, None if met is None else met.spec, args.top, names)
    view = [] if met is None else [str(met)]
    for path, classes in zip(paths, found, strict=True):
        view.append(path)
        view += [f"  {100 * one['probability']:5.1f} %  {one['name'] or ''} ({one['class']})" for one in classes]
    images = [{"image": path, "classes": classes} for path, classes in zip(paths, found, strict=True)]
    return {"images": images}, view


def curve_folder(run: Path | str) -> Path:
    """Where `curve` writes to, and `report` looks, unless another folder is named."""
    return Path(f"{short_name(str(run))}-curve")


def curve(args: Namespace) -> Outcome:
    """Table, CSV and PNG of accuracy against size."""
    check_typed(args)
    check_saved(args.run, folder_format.SUPER)
    check_inputs(args, "val")
    out = args.out or curve_folder(args.run)
    check_free(out, args.overwrite)
    net = SuperNet.load(saved_at(args.run), pick_device(args.device))
    points = measured(args, net)
    write_curve(points, out, curves.title_of(net), args.overwrite)
    result = {"points": [vars(point) for point in points], "folder": str(out)}
    return result, [curves.table(points), f"wrote {out}/curve.csv and curve.png"]


def measured(args: Namespace, net: SuperNet) -> list[curve_points.Point]:
    """The accuracy of a super-network along the ladder.

    Raises:
        BudgetError: No share of the ladder is reachable.
    """
    judge, images = judge_and_images(args, net, net.data_config)
    before = points_before(args, judge, images)
    points = curve_points.with_before(curves.curve(net, images, args.shares, judge), before)
    if points:
        _warn_near_chance(args, net, points[0].top1, points[0].n)
    else:
        raise BudgetError(
            f"none of the shares {', '.join(args.shares)} is reachable; `stratavit info {args.run}` shows the range"
        )
    return points


def points_before(args: Namespace, judge: curves.Judge, images: Iterable[Any]) -> list[curve_points.Point]:
    """The earlier curve that `--before` names, measured on the same images if it is a super-network."""
    if args.before is None or not folder_format.is_supernet(args.before):
        return [] if args.before is None else curve_points.points_in(args.before)
    return curves.curve(SuperNet.load(args.before, pick_device(args.device)), images, args.shares, judge)


def write_curve(points: list[curve_points.Point], out: str | Path, title: str, overwrite: bool) -> None:
    """Writes ``curve.csv`` and ``curve.png`` to a folder."""

    def write(folder: Path) -> None:
        curve_points.write_csv(points, folder / "curve.csv")
        plots.plot(points, folder / "curve.png", title)

    write_folder(out, write, overwrite)


def report(args: Namespace) -> Outcome:
    """RUN, and its accuracy if it is given or can be measured, to one HTML page."""
    check_typed(args)
    usual = curve_folder(args.run)
    found = usual if args.curve is None and args.data is None and usual.is_dir() else args.curve
    _check_report(args, found)
    setting = Setting(args.latency_batch, args.runtime, args.dtype, args.threads) if args.latency else None
    check_saved(args.run, folder_format.SUPER)
    check_inputs(args, "val")
    points = [] if found is None else curve_points.points_in(found)
    out = args.out or f"{short_name(args.run)}-report.html"
    check_free_file(out, args.overwrite)
    net = SuperNet.load(saved_at(args.run), pick_device(args.device))
    if args.data is not None:
        points = measured(args, net)
    file = write_report(net, out, points, args.title, args.overwrite, latency=setting, run=str(args.run))
    size, sizes = file.stat().st_size, len(curves.lists_in(net)[list_shown(net, points)]) + 1
    text = f"wrote {file} ({size / 2**10:.0f} KiB): {sizes} sizes"
    source = "" if found is None else f" (from {found})"
    text += f", {len(points)} of them measured{source}" if points else "; --curve DIR or --data DIR adds accuracy"
    return {"file": str(file), "bytes": size, "sizes": sizes, "points": len(points)}, [text]


def _check_report(args: Namespace, found: str | Path | None) -> None:
    """Raises for options that exclude each other, or that lack the curve that they speak of."""
    if args.curve is not None and args.data is not None:
        raise StrataViTError("--curve and --data are two ways to the same accuracies; give one of them")
    if args.data is None and not _by_head(args):
        raise StrataViTError("--knn, --probe and --zero-shot say how images are measured; give --data, too")
    if args.latency and found is None and args.data is None:
        raise StrataViTError("--latency times the points of the curve; give --curve or --data, too")
