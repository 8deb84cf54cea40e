"""Options that several commands have, and what is read from them."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any, get_args

from stratavit.budgets.amounts import GOALS, KINDS, check_amount
from stratavit.choices import NEIGHBOURS, Precision, Runtime
from stratavit.errors import BudgetError
from stratavit.evaluation.curve_points import LADDER, parse_share

if TYPE_CHECKING:
    from torch import nn

    from stratavit.data.image_folder import ImageLoader

Outcome = tuple[dict[str, Any], list[Any]]  # plain data for --json, and a view for people
CLASS_MAP = "text file, one class folder name per line in the order of the head"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def shares(text: str) -> tuple[str, ...]:
    """Shares of the dense MACs, for example ``1,8/12,0.5``."""
    for part in text.split(","):
        try:
            parse_share(part)
        except ValueError as error:
            raise ArgumentTypeError(f"cannot read {part!r} as a share above 0 and at most 1") from error
    return tuple(text.split(","))


def least_width(text: str) -> tuple[str, int | float]:
    """A least width with the pattern of the sites that keep it: ``16``, ``25%`` or ``*.mlp=25%``."""
    pattern, _, amount = text.rpartition("=")
    try:
        return pattern or "*", int(amount) if amount.isdecimal() else parse_share(amount)
    except ValueError as error:
        raise ArgumentTypeError(f"cannot read {text!r} as channels (16), a share (25%) or PATTERN=AMOUNT") from error


def default_workers() -> int:
    """Image-loading processes: one per core, four at most."""
    return min(4, os.cpu_count() or 1)


def add_model(command: ArgumentParser) -> None:
    """Where weights come from."""
    add = command.add_argument
    add("--weights", metavar="FILE", help="local checkpoint (.safetensors or .pth) instead of the one on the hub")
    add("--num-classes", type=positive, help="number of classes (default: that of the architecture)")


def add_data(command: ArgumentParser, what: str, required: bool = True) -> None:
    """A folder of images, and how it is read."""
    add = command.add_argument
    add("--data", required=required, metavar="DIR", help=what)
    add("--class-map", metavar="FILE", help=CLASS_MAP)
    add("--batch-size", type=positive, default=64, help="images per batch (default: %(default)s)")
    add("--workers", type=int, default=default_workers(), help="image-loading processes (default: %(default)s)")


def add_limit(command: ArgumentParser) -> None:
    """Images to measure on, at most."""
    text = "for a quick look: measure on at most N images, spread evenly over the classes (default: all)"
    command.add_argument("--limit", type=positive, metavar="N", help=text)


def add_out(command: ArgumentParser, name: str, what: str, required: bool = True) -> None:
    """Where the result goes."""
    command.add_argument("--out", required=required, metavar=name, help=what)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_judge(command: ArgumentParser) -> None:
    """On how many images, and how models that output features are measured."""
    add_limit(command)
    add = command.add_argument_group("how to measure", "by the classes of the head if none is given").add_argument
    neighbours = f"by the K nearest neighbours in train/ (default K: {NEIGHBOURS})"
    probe = "by a linear probe (ridge regression) fitted on train/ (default RIDGE: the best on a fifth held back)"
    texts = "by text embeddings of the classes: a .safetensors file, one tensor [classes, width]"
    add("--knn", nargs="?", type=int, const=NEIGHBOURS, metavar="K", help=neighbours)
    add("--probe", nargs="?", type=float, const=True, metavar="RIDGE", help=probe)
    add("--zero-shot", metavar="FILE", help=texts)
    text = "mixed precision while measuring (default: %(default)s)"
    add("--precision", choices=("no", "fp16", "bf16"), default="no", help=text)


def add_ladder(command: ArgumentParser) -> None:
    """Sizes to measure at."""
    text = "shares of the dense MACs, for example 1,8/12,0.5 (default: twelfths)"
    command.add_argument("--shares", type=shares, default=LADDER, metavar="LIST", help=text)
    text = "RUN before it was recovered or trained, or the folder of its curve: shown next to the accuracy"
    command.add_argument("--before", metavar="RUN|DIR", help=text)


def add_floors(command: ArgumentParser) -> None:
    """What no sub-network may lose."""
    group = command.add_argument_group("what every sub-network keeps")
    text = "modules that are never cut, by name ('blocks.0.*'); blocks.N.tokens: no tokens are merged there"
    group.add_argument("--ignore", nargs="+", action="extend", metavar="PATTERN", help=text)
    text = "least width: channels (16) or a share of the full width (25%%), also by name ('*.mlp=25%%')"
    group.add_argument("--min-width", type=least_width, nargs="+", action="extend", metavar="AMOUNT", help=text)


def add_latency_batch(command: Any) -> None:
    """Images per timed batch."""
    text = "images per timed batch (default: %(default)s)"
    command.add_argument("--latency-batch", type=positive, default=1, metavar="N", help=text)


def add_costs(command: ArgumentParser) -> Any:
    """Budgets of what can be computed; returns their group."""
    group = command.add_argument_group("budgets: the largest sub-network within all given budgets")
    add = group.add_argument
    add("--macs", metavar="BUDGET", help="a share of the dense model (50%%, 0.5, 8/12) or a count (2.1G)")
    add("--params", metavar="BUDGET", help="likewise (50%%, 8/12, 12M)")
    add("--memory", metavar="MB", dest="memory_mb", help="megabytes of weights (12, 12MB, 12MiB), or a share (50%%)")
    add("--position", type=int, metavar="N", help="drop the first N entries of the dropout list")
    text = "type of the weights, in the result, --memory and timings (default: as saved)"
    add("--dtype", choices=get_args(Precision), help=text)
    add("--threads", type=positive, default=0, help="CPU threads for timings (default: torch's setting)")
    return group


def add_budgets(command: ArgumentParser) -> None:
    """Budgets of costs, latency among them."""
    group = add_costs(command)
    text = "milliseconds per batch on this device (8.5, 8ms), or a share of the dense model's (50%%)"
    group.add_argument("--latency", metavar="MS", dest="latency_ms", help=text)
    add_latency_batch(group)
    text = "runtime for --latency (default: %(default)s)"
    group.add_argument("--runtime", choices=get_args(Runtime), default="eager", help=text)


def budgets(args: Namespace) -> Any:
    """The budgets that were given, and how latency is timed; empty if there are none.

    Raises:
        BudgetError: One cannot be read, or they do not go together; no network is needed to see that.
    """
    asked = {kind: getattr(args, kind, None) for kind in (*KINDS, "position")}
    given = {kind: amount for kind, amount in asked.items() if amount is not None}
    if not given:
        return {}
    if "position" in given and len(given) > 1:
        raise BudgetError("--position goes with no other budget; leave one of them out")
    for kind, amount in given.items():
        if kind != "position":
            check_amount(kind, amount)
        if kind in GOALS and args.data is None:
            raise BudgetError(f"{kind}: is measured on labelled images; give --data DIR")
    from stratavit.evaluation.latency import Setting

    setting = Setting(getattr(args, "latency_batch", 1), getattr(args, "runtime", "eager"), args.dtype, args.threads)
    return asked | {"setting": setting}


def several(args: Namespace) -> dict[str, Any]:
    """The folders to write, with what `budgets` reads for each: one, or one for each amount of a list.

    Raises:
        BudgetError: See `budgets`; there is none, two are lists, or two amounts give one name.
    """
    if all(getattr(args, kind) is None for kind in (*KINDS, "position")):
        raise BudgetError(
            "give at least one budget: --macs, --params, --memory, --latency, --top1, --max-drop or --position"
        )
    lists = {kind: str(getattr(args, kind)).split(",") for kind in KINDS if "," in str(getattr(args, kind))}
    if not lists:
        return {str(args.out): budgets(args)}
    if len(lists) > 1:
        raise BudgetError(f"{' and '.join(lists)}: one budget may name several amounts, the others one")
    ((kind, amounts),) = lists.items()
    base = str(args.out).rstrip("/")
    found = {f"{base}-{_in_a_name(amount)}": budgets(Namespace(**vars(args) | {kind: amount})) for amount in amounts}
    if len(found) < len(amounts):
        raise BudgetError(f"{kind}: {', '.join(amounts)}: two of these would be written to one folder; leave one out")
    return found


def _in_a_name(amount: str) -> str:
    """An amount as part of a folder's name: 8/12 becomes 8of12, 50% 50pct."""
    return "".join(
        letter for letter in amount.replace("/", "of").replace("%", "pct") if letter.isalnum() or letter == "."
    )


def loader_of(
    args: Namespace,
    data_config: dict[str, Any],
    split: str,
    head: nn.Module | None = None,
    limit: int | None = None,
    classes: int = 0,
) -> ImageLoader:
    """Images of ``--data``, checked against the head of a model, or against so many classes (0: any)."""
    from stratavit.data.class_names import class_names_of
    from stratavit.data.image_folder import image_loader
    from stratavit.utils.model import classes_of

    names, quick = None, getattr(args, "limit", None) if split == "val" else None
    if head is not None:
        classes, names = classes_of(head), class_names_of(head)
    options = (args.class_map, args.batch_size, max(args.workers, 0), limit or quick, names)
    return image_loader(args.data, data_config, split, classes, *options)
