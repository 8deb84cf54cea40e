"""The commands that measure accuracy: ``evaluate``, ``curve`` and, with images, ``report``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.cli import options
from stratavit.cli.options import Outcome
from stratavit.data.image_folder import ImageLoader
from stratavit.data.splits import split_folder
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.accuracy import evaluate as evaluate_model
from stratavit.evaluation.features import knn, read_embeddings
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free, check_free_file, write_folder
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import curve as curves
from stratavit.reports import plots
from stratavit.reports.html import write_report
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device


def judge_and_images(args: Namespace, model: nn.Module, config: dict[str, Any]) -> tuple[curves.Judge, ImageLoader]:
    """How a model is measured, as `add_judge` lets one choose, and on what.

    Raises:
        StrataViTError: Two ways are asked for, or the images do not suit the one.
    """
    if args.zero_shot is not None and args.knn is not None:
        raise StrataViTError("--knn and --zero-shot are two ways to measure; give one of them")
    if args.zero_shot is not None:
        embeddings = read_embeddings(args.zero_shot)
        images = options.loader_of(args, config, "val", classes=len(embeddings))
        return curves.judge_of(model, embeddings=embeddings), images
    if args.knn is None:
        return evaluate_model, options.loader_of(args, config, "val", model)
    if split_folder(args.data, "train") == split_folder(args.data, "val"):
        raise StrataViTError(
            f"data: {args.data} has no train/ and val/; --knn compares the images of val/ with those of train/, and "
            "images that are in both would find themselves"
        )
    bank, images = (options.loader_of(args, config, split) for split in ("train", "val"))
    return lambda model, loader, spec=None, description="nearest neighbours": knn(
        model, bank, loader, spec, args.knn, description=description
    ), images


def evaluate(args: Namespace) -> Outcome:
    """Accuracy of a saved folder or a timm model."""
    split_folder(args.data, "val")
    device, asked = pick_device(args.device), options.budgets(args)
    spec: Spec | None = None
    view: list[Any] = []
    if folder_format.is_supernet(args.target):
        net = SuperNet.load(args.target, device)
        if asked:
            met = net.budget(**asked)
            spec, view = met.spec, [str(met)]
        model: nn.Module = net
        config = net.data_config
    else:
        model = model_at(args.target, args.weights, args.num_classes, device)
        config = resolve_data_config(model)
        if asked:
            raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
    judge, images = judge_and_images(args, model, config)
    metrics = judge(model, images, spec, description="evaluate")
    return metrics.to_dict() | {"unreadable": len(images.unreadable)}, [*view, str(metrics)]


def curve(args: Namespace) -> Outcome:
    """Table, CSV and PNG of accuracy against size."""
    out = args.out or f"{str(args.run).rstrip('/')}-curve"
    check_free(out, args.overwrite)
    net = SuperNet.load(args.run, pick_device(args.device))
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
    points = curves.curve(net, images, args.shares, judge)
    if not points:
        raise BudgetError(
            f"none of the shares {', '.join(args.shares)} is reachable; `stratavit info {args.run}` shows the range"
        )
    return points


def write_curve(points: list[curve_points.Point], out: str | Path, title: str, overwrite: bool) -> None:
    """Writes ``curve.csv`` and ``curve.png`` to a folder."""

    def write(folder: Path) -> None:
        curve_points.write_csv(points, folder / "curve.csv")
        plots.plot(points, folder / "curve.png", title)

    write_folder(out, write, overwrite)


def report(args: Namespace) -> Outcome:
    """RUN, and its accuracy if it is given or can be measured, to one HTML page."""
    out = args.out or f"{str(args.run).rstrip('/')}-report.html"
    check_free_file(out, args.overwrite)
    if args.curve is not None and args.data is not None:
        raise StrataViTError("--curve and --data are two ways to the same accuracies; give one of them")
    if args.data is None and (args.knn is not None or args.zero_shot is not None):
        raise StrataViTError("--knn and --zero-shot say how images are measured; give --data, too")
    if args.latency and args.curve is None and args.data is None:
        raise StrataViTError("--latency times the points of the curve; give --curve or --data, too")
    setting = Setting(args.latency_batch, args.runtime, args.dtype, args.threads) if args.latency else None
    net = SuperNet.load(args.run, pick_device(args.device))
    points = [] if args.curve is None else curve_points.points_in(args.curve)
    if args.data is not None:
        points = measured(args, net)
    file = write_report(net, out, points, args.title, args.overwrite, latency=setting, run=str(args.run))
    assert net.strata is not None
    size, sizes = file.stat().st_size, len(net.strata) + 1
    text = f"wrote {file} ({size / 2**10:.0f} KiB): {sizes} sizes"
    text += f", {len(points)} of them measured" if points else "; --curve DIR or --data DIR adds accuracy"
    return {"file": str(file), "bytes": size, "sizes": sizes, "points": len(points)}, [text]
