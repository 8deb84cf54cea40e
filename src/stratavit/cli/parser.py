"""The command line: arguments in, exit code out. What a command does is in `commands`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args

from rich.console import Console

from stratavit.cli import options
from stratavit.cli.arguments import positive
from stratavit.data.batches import OUT_OF_MEMORY_HINT, watched
from stratavit.errors import StrataViTError, reason_of
from stratavit.evaluation.curve_points import LADDER
from stratavit.evaluation.latency import Precision, Runtime
from stratavit.interop.export import SUFFIXES
from stratavit.utils import signals
from stratavit.version import __version__

_EXAMPLES = """examples:
  stratavit demo                                                    see it work, nothing to download
  stratavit convert deit_tiny_patch16_224 --data IMAGENET --out run     once: sort the knowledge
  stratavit curve run --data IMAGENET                                   accuracy at every size
  stratavit report run --curve run-curve                                all of it as one HTML page
  stratavit extract run --macs 50% --out small                          a plain timm model
  stratavit extract run --latency 8 --max-drop 2 --data IMAGENET --out small    any budgets at once
  stratavit train run --data IMAGENET --out run2                        PIAD: every size trained
  stratavit finetune small --data IMAGENET --out tuned                  train that one further
  stratavit export small                                                small.onnx
  stratavit bench small                                                 how fast it is
  stratavit evaluate tuned --data IMAGENET
"""


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    from stratavit.cli import bench as bench_command
    from stratavit.cli import commands
    from stratavit.cli import convert as convert_command
    from stratavit.cli import measure as measure_command
    from stratavit.cli import models as models_command
    from stratavit.cli import report as report_command
    from stratavit.cli import train as train_command

    main_parser = argparse.ArgumentParser(
        prog="stratavit",
        description="Turn one pre-trained Vision Transformer into a super-network; slice any size out of it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_parser.add_argument("--version", action="version", version=f"stratavit {__version__}")
    commands_ = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = _command(commands_, "convert", convert_command.convert, "make a super-network from a pre-trained model")
    convert.add_argument(
        "model",
        metavar="MODEL|FOLDER",
        help="timm's name, for example deit_tiny_patch16_224; torchvision's, for example vit_b_16; or the folder of a "
        "small model or of a model of transformers",
    )
    _model_options(convert)
    _data_options(convert, "images to calibrate on: a folder with train/, or the class folders themselves")
    _out_options(convert, "RUN", "folder to write the super-network to")
    convert_command.add_convert_options(convert)

    train = _command(
        commands_, "train", train_command.train, "train a super-network, so that every size is good without fine-tuning"
    )
    train.add_argument("run", metavar="RUN", help="folder of a super-network, made by convert")
    train_command.add_train_options(train)

    finetune = _command(commands_, "finetune", train_command.finetune, "train one small model further")
    finetune.add_argument("small", metavar="SMALL", help="folder of a small model, made by extract")
    train_command.add_finetune_options(finetune)

    extract = _command(commands_, "extract", commands.extract, "slice a plain small model out of a super-network")
    extract.add_argument("run", metavar="RUN", help="folder of a super-network")
    _budget_options(extract)
    goals = extract.add_argument_group("budgets of accuracy: the smallest sub-network that keeps them")
    goals.add_argument("--top1", metavar="PERCENT", help="at least so many percent of the images in --data right")
    goals.add_argument("--max-drop", metavar="POINTS", help="at most so many points of top-1 lost on --data")
    _data_options(extract, "labelled images for --top1 and --max-drop: a folder with val/, or class folders", False)
    _out_options(extract, "SMALL", "folder to write the small model to")

    evaluate = _command(commands_, "evaluate", measure_command.evaluate, "measure accuracy on labelled images")
    evaluate.add_argument(
        "target", metavar="SMALL|RUN|MODEL", help="a saved folder, one of transformers, or a name as for convert"
    )
    _model_options(evaluate)
    _data_options(evaluate, "labelled images: a folder with val/, or the class folders themselves")
    measure_command.add_judge_options(evaluate)
    _budget_options(evaluate)

    curve = _command(commands_, "curve", measure_command.curve, "accuracy at a ladder of budgets: table, CSV, PNG")
    curve.add_argument("run", metavar="RUN", help="folder of a super-network")
    _data_options(curve, "labelled images: a folder with val/, or the class folders themselves")
    measure_command.add_judge_options(curve)
    _ladder_option(curve)
    _out_options(curve, "DIR", "folder for curve.csv and curve.png (default: RUN-curve)", required=False)

    report = _command(
        commands_, "report", report_command.report_page, "one HTML page: every size, its accuracy, the dropout list"
    )
    report.add_argument("run", metavar="RUN", help="folder of a super-network")
    report_command.add_report_options(report)
    _data_options(report, "labelled images to measure accuracy on: a folder with val/, or class folders", False)
    measure_command.add_judge_options(report)
    _ladder_option(report)
    _out_options(report, "FILE", "page to write (default: RUN-report.html)", required=False)

    export = _command(
        commands_,
        "export",
        commands.export,
        "write a small model for other libraries: ONNX, torch.export, transformers",
    )
    export.add_argument("small", metavar="SMALL", help="folder of a small model")
    export.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="(default: %(default)s)")
    export.add_argument("--images", type=positive, default=32, help="images to compare on (default: %(default)s)")
    _data_options(export, "images to compare on, a folder with val/ or the class folders (default: noise)", False)
    _out_options(
        export,
        "FILE",
        "file to write (default: SMALL.onnx, SMALL.pt2, or the folder SMALL-transformers)",
        required=False,
    )

    bench = _command(commands_, "bench", bench_command.run, "latency and throughput beside the dense model's")
    bench.add_argument("target", metavar="SMALL|RUN", help="a saved folder; of a super-network several sizes are timed")
    bench.add_argument(
        "--shares",
        type=_shares,
        default=("10/12", "8/12", "6/12", "4/12"),
        metavar="LIST",
        help="of a super-network: shares of the dense MACs (default: 10/12 to 4/12)",
    )
    bench.add_argument(
        "--batches", type=_counts, default=bench_command.BATCHES, metavar="LIST", help="batch sizes (default: 1,64)"
    )
    bench.add_argument(
        "--runtimes", type=_runtimes, metavar="LIST", help="of eager, compiled, onnx (default: eager, and onnx if here)"
    )
    bench.add_argument(
        "--seconds", type=float, default=2.0, help="shortest time per model and setting (default: %(default)s)"
    )
    _cost_options(bench)

    push = _command(commands_, "push", commands.push, "upload to the Hugging Face hub, with a model card")
    push.add_argument("target", metavar="SMALL|RUN", help="a saved folder")
    push.add_argument("repo", metavar="USER/NAME", help="repository; made if it is not there")
    push.add_argument("--curve", metavar="DIR", help="folder written by curve, for the card")
    push.add_argument("--license", metavar="NAME", help="of the weights, the hub's name for it, such as apache-2.0")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--no-moments", action="store_true", help="leave out second moments")
    push.add_argument("--endpoint", metavar="URL", help="address of another hub")
    push.add_argument("--dry-run", metavar="DIR", help="write what would be uploaded to a folder instead")
    push.add_argument("--overwrite", action="store_true", help="replace what is in DIR")

    models = _command(commands_, "models", models_command.models, "list what is supported, and to what degree")
    models_command.add_models_options(models)

    info = _command(
        commands_, "info", commands.info, "sites, widths, MACs, parameters and provenance of a saved folder"
    )
    info.add_argument("target", metavar="SMALL|RUN", help="a saved folder")

    demo = _command(
        commands_, "demo", commands.demo, "the whole job on a small model and images that come with scikit-learn"
    )
    _out_options(demo, "DIR", "folder for the results (default: stratavit-demo)", required=False)
    demo.add_argument(
        "--epochs", type=positive, default=30, help="training epochs of the small model (default: %(default)s)"
    )
    return main_parser


def _command(group: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = group.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    command.set_defaults(run_command=run)
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return command


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--weights", metavar="FILE", help="local checkpoint (.safetensors or .pth) instead of the hub's"
    )
    command.add_argument("--num-classes", type=positive, help="size of the head, if not the architecture's own")


def _data_options(command: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    command.add_argument("--data", required=required, metavar="DIR", help=what)
    command.add_argument(
        "--class-map", metavar="FILE", help="text file, one class folder name per line in the order of the head"
    )
    command.add_argument("--batch-size", type=positive, default=64, help="images per batch (default: %(default)s)")
    command.add_argument(
        "--workers", type=int, default=options.default_workers(), help="image-loading processes (default: %(default)s)"
    )


def _budget_options(command: argparse.ArgumentParser) -> None:
    group = _cost_options(command)
    group.add_argument(
        "--latency", metavar="MS", dest="latency_ms", help="milliseconds per batch on this device (8.5), or a share"
    )
    group.add_argument(
        "--latency-batch", type=positive, default=1, metavar="N", help="images per timed batch (default: %(default)s)"
    )
    group.add_argument(
        "--runtime", choices=get_args(Runtime), default="eager", help="of --latency (default: %(default)s)"
    )


def _cost_options(command: argparse.ArgumentParser) -> Any:
    group = command.add_argument_group("budgets: the largest sub-network that keeps all that are given")
    group.add_argument("--macs", metavar="BUDGET", help="a share of the dense model (50%%, 0.5) or a count (2.1G)")
    group.add_argument("--params", metavar="BUDGET", help="likewise (50%%, 12M)")
    group.add_argument("--memory", metavar="MB", dest="memory_mb", help="megabytes of weights, or a share (50%%)")
    group.add_argument("--position", type=int, metavar="N", help="drop the first N entries of the dropout list")
    group.add_argument(
        "--dtype", choices=get_args(Precision), help="of weights, in --memory and timings (default: as saved)"
    )
    group.add_argument("--threads", type=positive, default=0, help="CPU threads of timings (default: torch's own)")
    return group


def _out_options(command: argparse.ArgumentParser, name: str, what: str, required: bool = True) -> None:
    command.add_argument("--out", required=required, metavar=name, help=what)
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def _ladder_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shares",
        type=_shares,
        default=LADDER,
        metavar="LIST",
        help="shares of the dense MACs, for example 1,8/12,0.5 (default: twelfths)",
    )


def _shares(text: str) -> tuple[str, ...]:
    from stratavit.evaluation.curve_points import parse_share

    for part in text.split(","):
        try:
            parse_share(part)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"cannot read {part!r} as a share above 0 and at most 1") from error
    return tuple(text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _runtimes(text: str) -> tuple[str, ...]:
    for part in text.split(","):
        if part not in get_args(Runtime):
            raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(get_args(Runtime))}, got {part!r}")
    return tuple(text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for an error of the user's, told in one line; 130 when interrupted, 143 when terminated.
    """
    args = parser().parse_args(argv)
    less = OUT_OF_MEMORY_HINT if "workers" in args else "free some memory, or take a smaller model"
    try:
        with signals.raised(), watched("", lambda: less):
            result, view = args.run_command(args)
    except StrataViTError as error:
        print(f"stratavit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = "terminated" if isinstance(stop, signals.Terminated) else "interrupted"
        print(f"stratavit {args.command}: {str(stop) or f'{said}; nothing half-written was left'}", file=sys.stderr)
        return signals.exit_code(stop)
    try:
        if args.json:
            print(json.dumps(result, indent=1))
        elif view:
            Console(soft_wrap=True, markup=False, emoji=False).print(*view, sep="\n")
        if sys.stdout is not None:  # as it is where the shell closed it
            sys.stdout.flush()
    except OSError as error:  # the disk that it goes to is full, or nobody reads it any more
        print(f"stratavit {args.command}: done, but cannot print the answer: {reason_of(error)}", file=sys.stderr)
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # the interpreter tries again at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
