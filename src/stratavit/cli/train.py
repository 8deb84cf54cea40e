"""The commands ``train`` and ``finetune``: every key of the recipe is an option too."""

from __future__ import annotations

import copy
import os
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from torch import nn

from stratavit.artifacts import sub_network
from stratavit.artifacts.model_loading import model_at
from stratavit.cli.options import CLASS_MAP, Outcome, default_workers
from stratavit.data.class_names import MEND, class_names_of, full_names, set_class_names
from stratavit.data.image_files import class_folders
from stratavit.data.image_folder import ImageLoader, image_loader
from stratavit.data.shared_images import report_shared_images
from stratavit.data.splits import find_split
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.models.architecture import resolve_data_config
from stratavit.reports import curve
from stratavit.supernet import SuperNet
from stratavit.tasks.finetune import finetune as finetune_model
from stratavit.training.augmentation import TrainingFolder, training_transform
from stratavit.training.distributed import leave_process_group
from stratavit.training.recipe import FINETUNING, LIST_KEYS, Recipe, field_types
from stratavit.training.run_files import LOG_FILE, Journal, read_state
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of
from stratavit.utils.text import human

_PREFIX = "recipe_"


def train_options(command: ArgumentParser) -> None:
    """RUN and the recipe of PIAD."""
    command.set_defaults(base={})
    command.add_argument("run", metavar="RUN", help="folder of a super-network, made by convert")
    _add_options(command, "RUN2", "default: the paper's for DeiT-S", ())


def finetune_options(command: ArgumentParser) -> None:
    """SMALL and the recipe of fine-tuning."""
    command.set_defaults(base=FINETUNING)
    command.add_argument("small", metavar="SMALL", help="folder of a small model, made by extract")
    text = "replace the head by a new one for the classes of the data"
    command.add_argument("--new-head", action="store_true", help=text)
    _add_options(command, "TUNED", "default: the paper's fine-tuning", LIST_KEYS)


def _add_options(command: ArgumentParser, out: str, default: str, without: tuple[str, ...]) -> None:
    """Data, folder, recipe, teacher and one option per key of the recipe."""
    add = command.add_argument
    text = "a folder with train/ and, for evaluation, val/"
    add("--data", required=True, metavar="DIR", help=text)
    add("--class-map", metavar="FILE", help=CLASS_MAP)
    add("--out", metavar=out, help="folder of the run")
    add("--overwrite", action="store_true", help=f"empty {out} first")
    add("--recipe", "--config", metavar="FILE", help=f"TOML file of a recipe ({default})")
    text = "continue the interrupted run in this folder"
    add("--resume", nargs="?", const=True, default=False, metavar=out, help=text)
    add("--teacher", metavar="SMALL|MODEL", help="model whose outputs make up the share --distil of every target")
    add("--teacher-weights", metavar="FILE", help="local checkpoint of a teacher that is given by its name in timm")
    group = command.add_argument_group("recipe", "any key of the recipe; an option overrides the file")
    defaults = Recipe.from_dict(command.get_default("base")).to_dict()
    for key, kind in field_types().items():
        if key in without:
            continue
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


def recipe_of(args: Namespace) -> Recipe:
    """The recipe that was asked for: flags win over the file, that over the interrupted run's or the defaults."""
    overrides = {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}
    begun = read_state(Path(args.out))["recipe"] if args.resume else {}
    return Recipe.read(args.recipe, overrides, args.base | begun)


class Images(NamedTuple):
    """Images to train on, and loaders to measure on, and to evaluate on if there are images for it."""

    train: TrainingFolder
    proxy: ImageLoader
    evaluation: ImageLoader | None


def images_of(args: Namespace, config: Mapping[str, Any], head: nn.Module | None, recipe: Recipe) -> Images:
    """The images of ``--data``, checked against the head of a model (None: of as many classes as there are).

    Raises:
        StrataViTError: See `image_loader`; or the folders to evaluate on are others than those to train on.
    """
    classes, names = (None, None) if head is None else (classes_of(head), class_names_of(head))
    options = (args.class_map, recipe.batch_size, min(recipe.workers, default_workers()))
    proxy = image_loader(args.data, config, "train", classes, *options, recipe.proxy_images, names)
    evaluation, held_out = None, find_split(args.data, "val")
    if held_out is not None:
        ours, theirs = set(proxy.dataset.listing.classes), set(class_folders(held_out))
        if proxy.dataset.numbering.positions and ours != theirs:
            raise StrataViTError(
                f"data: class folders differ, {min(ours ^ theirs)!r} is there to train on or to evaluate on only, so "
                f"their numbers would too; {MEND}"
            )
        evaluation = image_loader(args.data, config, "val", classes, *options, class_names=names)
        report_shared_images(proxy, args.data, "val")
    train = TrainingFolder(copy.copy(proxy.dataset), training_transform(config, recipe))
    return Images(train, proxy, evaluation)


def _begin(args: Namespace, source: str) -> Recipe:
    """The recipe to train by; checks folder and device."""
    if args.device not in ("auto", "cpu", "cuda"):
        raise StrataViTError(
            f"device {args.device!r}: training takes auto, cpu or cuda; choose among several by CUDA_VISIBLE_DEVICES"
        )
    pick_device(args.device)
    if isinstance(args.resume, str):
        if args.out not in (None, args.resume):
            raise StrataViTError(f"--resume {args.resume} goes on in that folder; leave out --out {args.out}")
        args.out, args.resume = args.resume, True
    if args.out is None:
        raise StrataViTError("give the folder of the run: --out, or --resume to go on with an interrupted one")
    if Path(args.out).resolve() == Path(source).resolve():
        raise StrataViTError(f"{source} is what the run starts from; give it another folder with --out")
    if args.resume and args.overwrite:
        raise StrataViTError("--resume goes on with what --overwrite would delete; give one of them")
    return recipe_of(args)


def _how(args: Namespace, classes: int) -> dict[str, Any]:
    """How both kinds of training are run, for a student of so many classes."""
    teacher: nn.Module | None = None
    if args.teacher is not None:
        teacher = model_at(args.teacher, args.teacher_weights, None if Path(args.teacher).is_dir() else classes)
    elif args.teacher_weights is not None:
        raise StrataViTError("--teacher-weights needs --teacher MODEL")
    return {"resume": args.resume, "overwrite": args.overwrite, "cpu": args.device == "cpu", "teacher": teacher}


def _follower(args: Namespace) -> bool:
    """Leaves the other processes; whether this one is not the first, and prints nothing."""
    leave_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        return False
    args.json = False
    return True


def train(args: Namespace) -> Outcome:
    """RUN and training images to a trained super-network's folder."""
    from stratavit.tasks.piad import train_piad

    recipe = _begin(args, args.run)
    net = SuperNet.load(args.run)
    images = images_of(args, net.data_config, net, recipe)
    how = _how(args, net.model.num_classes)
    train_piad(net, images.train, images.evaluation, recipe, args.out, proxy=images.proxy, **how)
    if _follower(args):
        return {}, []
    assert net.strata is not None
    smallest = net.macs(net.strata.smallest())
    result = _outcome(args, net.provenance["train"], len(images.train))
    result |= {"run": str(args.out), "macs": net.macs(), "smallest_macs": smallest, "entries": len(net.strata)}
    text = (
        f"trained {result['steps']} steps on {result['images']} images: any size from {human(smallest)} to "
        f"{human(net.macs())} MACs is now a slice of {args.out}"
    )
    points = [curve_points.Point(**point) for point in result["points"]]
    return result, [curve.table(points), text] if points else [text]


def finetune(args: Namespace) -> Outcome:
    """SMALL and training images to a fine-tuned small model's folder."""
    recipe = _begin(args, args.small)
    model: Any = sub_network.load(args.small, timm_form=True)
    images = images_of(args, resolve_data_config(model), None if args.new_head else model, recipe)
    if args.new_head:
        new_head(model, images.proxy.class_names, recipe.seed)
    how = _how(args, model.num_classes)
    finetune_model(model, images.train, images.evaluation, recipe, args.out, **how)
    if _follower(args):
        return {}, []
    result = {"small": str(args.out), **_outcome(args, model.provenance["finetune"], len(images.train))}
    text = f"fine-tuned {result['steps']} steps on {result['images']} images; wrote {args.out}"
    measured = [f"top-1 {point['top1']:.2f} % over {point['n']} images" for point in result["points"]]
    return result, [*measured, text]


def new_head(model: Any, names: Sequence[str], seed: int) -> None:
    """Replaces the head by one of classes of these names, its weights drawn by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.reset_classifier(len(names))
    set_class_names(model, full_names(names))
    for key in ("macs", "params", "dense_macs", "dense_params"):  # counted with the old head
        getattr(model, "provenance", {}).pop(key, None)


def _outcome(args: Namespace, facts: Mapping[str, Any], images: int) -> dict[str, Any]:
    log = Journal(Path(args.out) / LOG_FILE).rows()
    return {
        "images": images,
        "steps": facts["steps"],
        "seconds": sum(row.get("seconds", 0) for row in log if row["kind"] == "epoch"),
        "points": [vars(point) for point in curve_points.last_curve(log)],
    }
