"""The command ``stratavit train``: every key of the recipe is an option too."""

from __future__ import annotations

import os
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from stratavit import report
from stratavit.augment import TrainingFolder, training_transform
from stratavit.budget import human
from stratavit.checkpoint import LOG_FILE, Journal, read_state
from stratavit.commands import default_workers
from stratavit.data import image_loader
from stratavit.errors import StrataViTError
from stratavit.processes import part
from stratavit.recipe import Recipe, field_types
from stratavit.supernet import SuperNet
from stratavit.train import train_piad

_PREFIX = "recipe_"
_EVALUATION = ("val", "validation", "test")


def add_options(command: ArgumentParser) -> None:
    """Data, folder, recipe and one option per key of the recipe."""
    command.add_argument(
        "--data", required=True, metavar="DIR", help="a folder with train/, and val/ to evaluate on if there is one"
    )
    command.add_argument(
        "--class-map", metavar="FILE", help="text file, one class folder name per line in the order of the head"
    )
    command.add_argument("--out", required=True, metavar="RUN2", help="folder of the run; with --resume, to go on in")
    command.add_argument("--recipe", metavar="FILE", help="TOML file of a recipe (default: the paper's for DeiT-S)")
    command.add_argument("--resume", action="store_true", help="go on with the interrupted run in RUN2")
    group = command.add_argument_group("recipe", "any key of the recipe, over what the file says")
    defaults = Recipe().to_dict()
    for key, kind in field_types().items():
        choices = get_args(kind) if get_origin(kind) is Literal else None
        group.add_argument(
            f"--{key.replace('_', '-')}",
            dest=_PREFIX + key,
            type=str if choices else kind,
            choices=choices,
            default=SUPPRESS,
            metavar=None if choices else kind.__name__.upper(),
            help=f"(default: {defaults[key]!r})".replace("%", "%%"),
        )


def recipe_of(args: Namespace) -> Recipe | None:
    """The recipe that was asked for; None for the interrupted run's own."""
    overrides = {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}
    if args.resume:
        if args.recipe is None and not overrides:
            return None
        begun = read_state(Path(args.out))["recipe"] if args.recipe is None else {}
        return Recipe.from_dict(begun | overrides) if begun else Recipe.read(args.recipe, overrides)
    return Recipe.read(args.recipe, overrides)


def train(args: Namespace) -> tuple[dict[str, Any], list[Any]]:
    """RUN and training images to a trained super-network's folder."""
    if args.device not in ("auto", "cpu", "cuda"):
        raise StrataViTError(
            f"device {args.device!r}: training takes auto, cpu or cuda; choose among several by CUDA_VISIBLE_DEVICES"
        )
    asked = recipe_of(args)
    recipe = asked or Recipe.from_dict(read_state(Path(args.out))["recipe"], args.out)
    net = SuperNet.load(args.run)
    config, classes = net.data_config, net.model.num_classes
    options = (classes, args.class_map, recipe.batch_size, min(recipe.workers, default_workers()))
    images = TrainingFolder(
        image_loader(args.data, config, "train", *options).dataset, training_transform(config, recipe)
    )
    proxy = image_loader(args.data, config, "train", *options, limit=recipe.proxy_images)
    held_out = any((Path(args.data) / name).is_dir() for name in _EVALUATION)
    evaluation = image_loader(args.data, config, "val", *options) if held_out else None
    train_piad(net, images, asked, args.out, proxy, evaluation, args.resume, cpu=args.device == "cpu")
    part()
    if int(os.environ.get("RANK", "0")) > 0:
        args.json = False
        return {}, []
    return _outcome(args, net, len(images))


def _outcome(args: Namespace, net: SuperNet, images: int) -> tuple[dict[str, Any], list[Any]]:
    assert net.strata is not None
    smallest = net.macs(net.strata.spec(len(net.strata)))
    log = Journal(Path(args.out) / LOG_FILE).rows()
    measured = [row["points"] for row in log if row["kind"] == "eval"]
    points = [report.Point(**point) for point in measured[-1]] if measured else []
    trained = net.provenance["train"]
    result = {
        "run": str(args.out),
        "images": images,
        "steps": trained["steps"],
        "seconds": sum(row["seconds"] for row in log if row["kind"] == "epoch"),
        "macs": net.macs(),
        "smallest_macs": smallest,
        "entries": len(net.strata),
        "points": [vars(point) for point in points],
    }
    text = (
        f"trained {trained['steps']} steps on {images} images: any size from {human(smallest)} to "
        f"{human(net.macs())} MACs is now a slice of {args.out}"
    )
    return result, [report.table(points), text] if points else [text]
