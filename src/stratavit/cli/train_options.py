"""Options of ``train``, ``finetune`` and ``recover``: every key of the recipe is one, too."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentParser
from inspect import cleandoc
from typing import Literal, get_args, get_origin

from stratavit.cli.options import CLASS_MAP, positive
from stratavit.cli.wording import PREFIX
from stratavit.training.recipe import LIST_KEYS, NOT_OF_RECOVERY, RECOVERY_IMAGES, RECOVERY_STEPS, Recipe, field_types

RESUME = "continue the interrupted run in this folder, with the same model and images unless others are given"
TEACHER_WEIGHTS = "local checkpoint of a teacher that is given by its name in timm"


def key_texts() -> dict[str, str]:
    """Key of a recipe -> what it means, as the documentation of `Recipe` says; empty without docstrings (``-OO``)."""
    attributes = cleandoc(Recipe.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(re.sub(r"`+", "", text).split()) for names, text in found for name in names.split(", ")}


def train_options(command: ArgumentParser) -> None:
    """RUN and the recipe of PIAD."""
    command.set_defaults(kind="train")
    command.add_argument("run", metavar="RUN", help="folder of a super-network, made by convert", nargs="?")
    _add_options(command, "RUN2", "default: the best measured; paper: that of the paper for DeiT-S", ())


def finetune_options(command: ArgumentParser) -> None:
    """SMALL and the recipe of fine-tuning."""
    command.set_defaults(kind="finetune")
    command.add_argument("small", metavar="SMALL", help="folder of a small model, made by extract", nargs="?")
    text = "replace the head by a new one for the classes of the data"
    command.add_argument("--new-head", action="store_true", help=text)
    _add_options(command, "TUNED", "default: one that learns from few images, too; paper: that of the paper", LIST_KEYS)


def _add_options(command: ArgumentParser, out: str, default: str, without: tuple[str, ...]) -> None:
    """Data, folder, recipe and teacher."""
    add = command.add_argument
    text = "a folder with train/ and, for evaluation, val/"
    add("--data", metavar="DIR", help=text)
    add("--class-map", metavar="FILE", help=CLASS_MAP)
    add("--out", metavar=out, help="folder of the run")
    add("--overwrite", action="store_true", help=f"empty {out} first")
    add("--recipe", "--config", metavar="FILE", help=f"TOML file of a recipe, or paper ({default})")
    add("--resume", nargs="?", const=True, default=False, metavar=out, help=RESUME)
    add("--teacher", metavar="SMALL|MODEL", help="model whose outputs make up the share --distil of every target")
    add("--teacher-weights", metavar="FILE", help=TEACHER_WEIGHTS)
    _add_recipe(command, without)


def recover_options(command: ArgumentParser) -> None:
    """SMALL or RUN, images, teacher, how long, and the recipe of recovery."""
    command.set_defaults(kind="recover")
    add = command.add_argument
    text = "folder of a small model, made by extract, or of a super-network, made by convert: then all sizes learn"
    add("target", metavar="SMALL|RUN", help=text, nargs="?")
    text = "a folder with images anywhere in it (below train/, if there is one); no labels are needed"
    add("--data", metavar="IMAGES", help=text)
    text = f"at most this many images, evenly spread; they are held in memory (default: {RECOVERY_IMAGES})"
    add("--images", type=positive, metavar="N", help=text)
    text = "what SMALL was cut from: its super-network or the model, a folder or a name (default for RUN: itself)"
    add("--teacher", metavar="RUN|MODEL", help=text)
    add("--teacher-weights", metavar="FILE", help=TEACHER_WEIGHTS)
    add("--out", metavar="OUT", help="folder of the run, and of the result: what was given, recovered")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--minutes", type=float, metavar="M", help="at most so many minutes; a few steps are timed first")
    text = f"steps of the optimiser, fewer if M is too short (default: {RECOVERY_STEPS})"
    add("--steps", type=positive, metavar="N", help=text)
    add("--recipe", "--config", metavar="FILE", help="TOML file of a recipe (default: recipes/recover.toml)")
    add("--resume", nargs="?", const=True, default=False, metavar="OUT", help=RESUME)
    _add_recipe(command, (*NOT_OF_RECOVERY, "epochs"))


def _add_recipe(command: ArgumentParser, without: tuple[str, ...]) -> None:
    """One option per key of the recipe."""
    group = command.add_argument_group("recipe", "any key of the recipe; an option overrides the file")
    defaults, texts = Recipe.read(None, kind=command.get_default("kind")).to_dict(), key_texts()
    for key, kind in field_types().items():
        if key in without:
            continue
        choices = get_args(kind) if get_origin(kind) is Literal else None
        group.add_argument(
            f"--{key.replace('_', '-')}",
            dest=PREFIX + key,
            type=str if choices else kind,
            choices=choices,
            default=SUPPRESS,
            metavar=None if choices else kind.__name__.upper(),
            help=f"{texts.get(key, '')} (default: {defaults[key]!r})".replace("%", "%%").strip(),
        )
