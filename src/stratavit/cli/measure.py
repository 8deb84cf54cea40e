"""The commands that measure accuracy: ``evaluate`` and ``curve``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.cli import options
from stratavit.data.class_names import class_names_of
from stratavit.data.splits import split_folder
from stratavit.errors import BudgetError, StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.accuracy import Metrics
from stratavit.evaluation.accuracy import evaluate as evaluate_model
from stratavit.evaluation.features import NEIGHBOURS, knn, read_embeddings
from stratavit.files.folders import check_free, write_folder
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import curve as curves
from stratavit.reports import plots
from stratavit.spec import Spec
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of


def add_judge_options(command: ArgumentParser) -> None:
    """How models are measured that answer with features."""
    group = command.add_argument_group("how to measure", "by default by the classes of the head")
    group.add_argument(
        "--knn",
        nargs="?",
        type=int,
        const=NEIGHBOURS,
        metavar="K",
        help=f"by the K nearest neighbours among the images of train/ (default K: {NEIGHBOURS})",
    )
    group.add_argument(
        "--zero-shot",
        metavar="FILE",
        help="by text embeddings of the classes: a .safetensors file, one tensor [classes, width]",
    )


class _Way(NamedTuple):
    """How a model is measured, the number of classes that the images must be of (0: any), and their names if known."""

    judge: curves.Judge
    classes: int = 0
    names: list[str] | None = None


def _way(args: Namespace, model: nn.Module, data_config: dict[str, Any]) -> _Way:
    if args.zero_shot is not None and args.knn is not None:
        raise StrataViTError("--knn and --zero-shot are two ways to measure; give one of them")
    if args.zero_shot is not None:
        embeddings = read_embeddings(args.zero_shot)
        return _Way(curves.judge_of(model, embeddings=embeddings), len(embeddings))
    if args.knn is None:
        return _Way(evaluate_model, classes_of(model), class_names_of(model))
    if split_folder(args.data, "train") == split_folder(args.data, "val"):
        raise StrataViTError(
            f"data: {args.data} has no train/ and val/; --knn compares the images of val/ with those of train/, and "
            "images that are in both would find themselves"
        )
    bank = options.loader_of(args, data_config, "train", 0)

    def judge(
        model: nn.Module, loader: Any, spec: Mapping[str, int] | None = None, description: str = "nearest neighbours"
    ) -> Metrics:
        return knn(model, bank, loader, spec, args.knn, description=description)

    return _Way(judge)


def evaluate(args: Namespace) -> options.Outcome:
    """Accuracy of a saved folder or a timm model."""
    split_folder(args.data, "val")
    device = pick_device(args.device)
    asked = options.budgets(args)
    spec: Spec | None = None
    view: list[Any] = []
    model: nn.Module
    if folder_format.is_supernet(args.target):
        model = net = SuperNet.load(args.target, device)
        if options.budgeted(asked):
            met = net.budget(**asked)
            spec, view = met.spec, [str(met)]
        config = net.data_config
    else:
        model = model_at(args.target, args.weights, args.num_classes, device)
        config = resolve_data_config(model)
    if options.budgeted(asked) and spec is None:
        raise BudgetError(f"{args.target} has one size only; budgets are for super-networks")
    way = _way(args, model, config)
    loader = options.loader_of(args, config, "val", way.classes, None, way.names)
    metrics = way.judge(model, loader, spec, description="evaluate")
    return metrics.to_dict() | {"unreadable": len(loader.unreadable)}, [*view, str(metrics)]


def curve(args: Namespace) -> options.Outcome:
    """Table, CSV and PNG of accuracy against size."""
    out = args.out or f"{str(args.run).rstrip('/')}-curve"
    check_free(out, args.overwrite)
    net = SuperNet.load(args.run, pick_device(args.device))
    points = measured(args, net)
    write_curve(points, out, curves.title_of(net), args.overwrite)
    return {"points": [vars(point) for point in points], "folder": str(out)}, [
        curves.table(points),
        f"wrote {out}/curve.csv and curve.png",
    ]


def measured(args: Namespace, net: SuperNet) -> list[curve_points.Point]:
    """The accuracy of a super-network along the ladder, as the options of `add_judge_options` and ``--shares`` say.

    Raises:
        BudgetError: No share of the ladder is reachable.
    """
    way = _way(args, net, net.data_config)
    loader = options.loader_of(args, net.data_config, "val", way.classes, None, way.names)
    points = curves.curve(net, loader, args.shares, way.judge)
    if not points:
        raise BudgetError(
            f"none of the shares {', '.join(args.shares)} is reachable; `stratavit info {args.run}` tells the range"
        )
    return points


def write_curve(points: list[curve_points.Point], out: str | Path, title: str, overwrite: bool) -> None:
    """Writes ``curve.csv`` and ``curve.png`` to a folder."""

    def write(folder: Path) -> None:
        curve_points.write_csv(points, folder / "curve.csv")
        plots.plot(points, folder / "curve.png", title)

    write_folder(out, write, overwrite)
