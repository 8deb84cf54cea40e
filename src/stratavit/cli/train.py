"""The commands ``train`` and ``finetune``: every key of the recipe is an option too."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.model_loading import model_at
from stratavit.cli.checks import check_inputs, check_model, check_saved
from stratavit.cli.options import Outcome, default_workers
from stratavit.cli.targets import model_named, saved_at
from stratavit.cli.wording import PREFIX
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
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import LOG_FILE, Journal, read_state
from stratavit.training.verdict import first_curve
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of
from stratavit.utils.text import human


def recipe_of(args: Namespace, begun: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that was asked for: flags win over the file, that over the interrupted run's or the defaults."""
    overrides = {key.removeprefix(PREFIX): value for key, value in vars(args).items() if key.startswith(PREFIX)}
    return Recipe.read(args.recipe, overrides, args.kind, begun)


_ORIGIN = {  # what a state keeps of the command that began the run, first what is trained
    "train": ("run", "data", "class_map", "teacher", "teacher_weights"),
    "finetune": ("small", "data", "class_map", "teacher", "teacher_weights", "new_head"),
    "recover": ("target", "data", "images", "teacher", "teacher_weights"),
}
_BATCH = 64  # of images that are only measured on, where the recipe says none


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
    options = (args.class_map, recipe.batch_size or _BATCH, min(recipe.workers, default_workers()))
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


def begin(args: Namespace) -> Recipe:
    """The recipe to train by; checks what was typed, then what is there."""
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
    if args.resume and args.overwrite:
        raise StrataViTError("--resume goes on with what --overwrite would delete; give one of them")
    begun = read_state(Path(args.out)) if args.resume else None
    source = _fill(args, {} if begun is None else begun.get("origin") or {})
    if Path(args.out).resolve() == Path(source).resolve():
        raise StrataViTError(f"{source} is what the run starts from; give it another folder with --out")
    if args.teacher is None and args.teacher_weights is not None:
        raise StrataViTError("--teacher-weights needs --teacher MODEL")
    recipe = recipe_of(args, None if begun is None else begun["recipe"])
    check_saved(source, {"train": folder_format.SUPER, "finetune": folder_format.SUB}.get(args.kind))
    if args.teacher is not None:
        check_model(args.teacher)
    check_inputs(args, *(() if args.kind == "recover" else ("train",)))
    return recipe


def _fill(args: Namespace, origin: Mapping[str, Any]) -> str:
    """Sets what is not given to what the interrupted run was given; returns what is trained."""
    source = _ORIGIN[args.kind][0]
    for name in _ORIGIN[args.kind]:
        if not getattr(args, name) and name in origin:
            setattr(args, name, origin[name])
    model = "SMALL or RUN" if source == "target" else source.upper()
    for name, text in ((source, model), ("data", "--data DIR")):
        if getattr(args, name) is None:
            raise StrataViTError(f"give {text}" + (f", which {args.out} does not name" if args.resume else ""))
    return str(getattr(args, source))


def origin(args: Namespace) -> dict[str, Any]:
    """What a run that is resumed needs to be given again, for its state; names of existing files are absolute."""
    found = {name: getattr(args, name) for name in _ORIGIN[args.kind] if getattr(args, name)}
    return {name: str(Path(v).resolve()) if isinstance(v, str) and Path(v).exists() else v for name, v in found.items()}


def _how(args: Namespace, classes: int) -> dict[str, Any]:
    """How both kinds of training are run, for a student of so many classes."""
    teacher: nn.Module | None = None
    if args.teacher is not None:
        named = model_named(args.teacher)
        teacher = model_at(named, args.teacher_weights, None if Path(named).is_dir() else classes)
    how = {"resume": args.resume, "overwrite": args.overwrite, "cpu": args.device == "cpu", "teacher": teacher}
    return how | {"origin": origin(args)}


def follower(args: Namespace) -> bool:
    """Leaves the other processes; whether this one is not the first, and prints nothing."""
    leave_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        return False
    args.json = False
    return True


def train(args: Namespace) -> Outcome:
    """RUN and training images to a trained super-network's folder."""
    from stratavit.tasks.piad import train_piad

    recipe = begin(args)
    net = SuperNet.load(saved_at(args.run))
    images = images_of(args, net.data_config, net, recipe)
    how = _how(args, net.model.num_classes)
    train_piad(net, images.train, images.evaluation, recipe, args.out, proxy=images.proxy, **how)
    if follower(args):
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
    recipe = begin(args)
    model: Any = sub_network.load(saved_at(args.small), timm_form=True)
    images = images_of(args, resolve_data_config(model), None if args.new_head else model, recipe)
    if args.new_head:
        new_head(model, images.proxy.class_names, recipe.seed)
    how = _how(args, model.num_classes)
    finetune_model(model, images.train, images.evaluation, recipe, args.out, **how)
    if follower(args):
        return {}, []
    result = {"small": str(args.out), **_outcome(args, model.provenance["finetune"], len(images.train))}
    text = f"fine-tuned {result['steps']} steps on {result['images']} images; wrote {args.out}"
    measured = [
        f"top-1 {new['top1']:.2f} % over {new['n']} images, {old['top1']:.2f} % before"
        for old, new in zip(result["before"], result["points"], strict=False)
    ]
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
        "before": [vars(point) for point in first_curve(log)],
        "points": [vars(point) for point in curve_points.with_before(curve_points.last_curve(log), first_curve(log))],
    }
