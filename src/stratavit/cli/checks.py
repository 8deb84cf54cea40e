"""What is checked before any work: what was typed, then what is there; where the result goes comes third."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import timm

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_names import check_name, is_on_hub, repository_of, timm_name
from stratavit.cli import options
from stratavit.data.splits import split_folder
from stratavit.errors import ArtifactError, BudgetError, StrataViTError
from stratavit.interop.exported_model import is_exported
from stratavit.utils.devices import pick_device

_FILES = ("class_map", "weights", "teacher_weights", "zero_shot")


def check_typed(args: Namespace) -> None:
    """Checks what needs no file: budgets, device, and options that exclude each other.

    Raises:
        BudgetError: A budget cannot be read, or lacks what it is measured on.
        StrataViTError: The device is not there, several ways to measure are given, or one lacks what it needs.
    """
    options.budgets(args)
    pick_device(args.device)
    ways = [
        f"--{key.replace('_', '-')}" for key in ("knn", "probe", "zero_shot") if getattr(args, key, None) is not None
    ]
    if len(ways) > 1:
        raise StrataViTError(f"{' and '.join(ways)} are different ways to measure; give one of them")
    ridge = getattr(args, "probe", None)  # True: to be chosen
    if ridge is not None and not 0 < ridge < float("inf"):
        raise StrataViTError(f"--probe: expected a ridge above 0, got {ridge:g}")
    if getattr(args, "agreement", False) and not options.budgets(args):
        raise StrataViTError("--agreement compares a size of RUN with its full size; give a budget, such as --macs 50%")


def check_inputs(args: Namespace, *splits: str) -> None:
    """Checks that files and images are there that the options name.

    Args:
        args: The options of a command.
        *splits: Of ``--data`` that the command reads, ``train`` or ``val``.

    Raises:
        StrataViTError: One is not.
    """
    for name in _FILES:
        path = getattr(args, name, None)
        if path is not None and not Path(path).is_file():
            raise StrataViTError(f"{name}: {path} is not a file")
    if getattr(args, "before", None) is not None and not Path(args.before).is_dir():
        raise StrataViTError(f"before: {args.before} is not a folder; expected RUN, or the folder of a curve")
    for split in splits if getattr(args, "data", None) is not None else ():
        split_folder(args.data, split)


def check_saved(name: str, kind: str | None = None) -> None:
    """Checks that RUN or SMALL is a folder of that kind; a repository on the hub is left to the download.

    Args:
        name: As it was typed.
        kind: `folder_format.SUPER` or `SUB`; None is either.

    Raises:
        ArtifactError: There is no such folder, or it holds something else.
    """
    if timm.is_model(timm_name(name)) and not Path(name).exists():
        raise ArtifactError(
            f"{name} is a model; make a super-network of it first: stratavit convert {name} --data DIR --out RUN"
        )
    if repository_of(name) is not None:
        return
    if not Path(name).is_dir():
        raise ArtifactError(
            f"{name} is not a folder; expected one saved by StrataViT, or a repository on the hub (user/name)"
        )
    found = folder_format.kind(name)
    if kind == folder_format.SUPER != found:
        raise ArtifactError(f"{name} holds a {found}, which has one size; give the folder that convert made")
    if kind == folder_format.SUB != found:
        raise ArtifactError(f"{name} holds a {found}; slice one size out of it first, by stratavit extract")


def check_model(name: str, asked: bool = False) -> None:
    """Checks that MODEL is there, if it is a folder or a file, or known, if it is a name.

    Args:
        name: As it was typed.
        asked: A budget is given.

    Raises:
        BudgetError: It has one size only.
        StrataViTError: It is neither.
    """
    if repository_of(name) is not None and is_on_hub(timm_name(f"hf-hub:{repository_of(name)}")):
        return
    if not Path(name).exists():
        if is_exported(name):
            raise StrataViTError(f"{name} is not a file")
        check_name(name)
    if asked and not folder_format.is_supernet(name):
        raise BudgetError(f"{name} has one size only; budgets are for super-networks")
