"""The command line: arguments in, exit code out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from stratavit.cli import arguments, train_options
from stratavit.cli.wording import Parser, UsageError, check_spelling, in_options
from stratavit.errors import StrataViTError, reason_of
from stratavit.utils import signals
from stratavit.version import __version__

_EXAMPLES = """examples:
  stratavit demo                                                    a complete example, nothing to download
  stratavit convert deit_tiny_patch16_224 --data IMAGENET --out run     once per model
  stratavit curve run --data IMAGENET                                   accuracy at every size
  stratavit report run --curve run-curve                                everything on one HTML page
  stratavit extract run --macs 50% --out small                          a plain timm model
  stratavit extract run --latency 8 --max-drop 2 --data IMAGENET --out small    several budgets
  stratavit recover small --teacher run --data IMAGES --out better      minutes, no labels
  stratavit train run --data IMAGENET --out run2                        PIAD: train all sizes
  stratavit finetune small --data IMAGENET --out tuned                  train that model further
  stratavit export small                                                small.onnx
  stratavit bench small                                                 latency and throughput
  stratavit evaluate tuned --data IMAGENET
"""

WIDE = 240  # characters of a line that goes to a file or a pipe
COMMANDS = {  # name -> module with a function of that name, which does the work; summary
    "convert": ("convert", "make a super-network from a pre-trained model"),
    "train": ("train", "train a super-network so that no size needs fine-tuning"),
    "recover": ("recover", "recover accuracy in minutes, on a few images without labels"),
    "finetune": ("train", "train one small model further"),
    "extract": ("commands", "slice a plain small model out of a super-network"),
    "evaluate": ("measure", "measure accuracy on labelled images"),
    "predict": ("measure", "name the most likely classes of a few images"),
    "curve": ("measure", "measure accuracy at a ladder of budgets: table, CSV, PNG"),
    "report": ("measure", "write one HTML page: every size, its accuracy, the dropout list"),
    "export": ("commands", "write a small model for other libraries: ONNX, torch.export, transformers"),
    "bench": ("bench", "measure latency and throughput next to the dense model's"),
    "push": ("commands", "upload to the Hugging Face hub, with a model card"),
    "models": ("commands", "list which models are supported, and to what degree"),
    "info": ("commands", "print sites, widths, MACs, parameters and provenance of a saved folder"),
    "demo": ("commands", "run all steps on a small model and images that come with scikit-learn"),
}


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its commands; nothing slow is imported for them."""
    main_parser = Parser(
        prog="stratavit",
        description="Turn one pre-trained Vision Transformer into a super-network; slice any size out of it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_parser.add_argument("--version", action="version", version=f"stratavit {__version__}")
    group = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}
    for name, (_, summary) in COMMANDS.items():
        command = group.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best available)")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        options = f"{name}_options"
        getattr(train_options if hasattr(train_options, options) else arguments, options)(command)
        commands[name] = command
    return main_parser, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for an error of the user's, reported in one line; 130 when interrupted, 143 when terminated.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    main_parser, commands = parsers()
    try:
        check_spelling(words, main_parser, commands)
        args = main_parser.parse_args(words)
    except UsageError as error:
        command = words[0] if words and words[0] in commands else None
        unread = argparse.Namespace(command=command, json="--json" in words)
        return _failed(unread, str(error), type(error).__name__, 2)
    done = _run(args, commands[args.command])
    return done if isinstance(done, int) else _print(args, *done)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int | tuple[dict[str, Any], list[Any]]:
    """Does the work; the exit code if it fails."""
    from stratavit.data.batches import OUT_OF_MEMORY_HINT, watched

    less = OUT_OF_MEMORY_HINT if "workers" in args else "free some memory, or take a smaller model"
    try:
        with signals.raised(), watched("", lambda: less):
            module = import_module(f"stratavit.cli.{COMMANDS[args.command][0]}")
            return getattr(module, args.command)(args)
    except StrataViTError as error:
        file = getattr(args, "recipe", None)  # whose keys are not options
        message = str(error) if file and str(error).startswith(file) else in_options(str(error), parser)
        return _failed(args, message, type(error).__name__, 2)
    except KeyboardInterrupt as stop:
        said = "terminated" if isinstance(stop, signals.Terminated) else "interrupted"
        text = str(stop) or f"{said}; nothing half-written was left"
        return _failed(args, text, type(stop).__name__, signals.exit_code(stop))


def _print(args: argparse.Namespace, result: dict[str, Any], view: list[Any]) -> int:
    """Prints the outcome; the exit code."""
    from rich.console import Console

    try:
        if args.json:
            print(json.dumps(result, indent=1))
        elif view:
            console = Console(soft_wrap=True, markup=False, emoji=False)
            if not console.is_terminal and "COLUMNS" not in os.environ:
                console.width = WIDE  # a file or a pipe has no edge that tables could be cut at
            console.print(*view, sep="\n")
        if sys.stdout is not None:  # as it is where the shell closed it
            sys.stdout.flush()
    except OSError as error:  # the disk that it goes to is full, or nobody reads it any more
        print(f"stratavit {args.command}: done, but cannot print the result: {reason_of(error)}", file=sys.stderr)
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # the interpreter tries again at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 2
    return 0


def _failed(args: argparse.Namespace, text: str, kind: str, code: int) -> int:
    """Says what went wrong on standard error, and with ``--json`` as an object on standard output, too."""
    text = text.removeprefix(f"{args.command}: ")
    print(f"stratavit{f' {args.command}' if args.command else ''}: {text}", file=sys.stderr)
    if args.json:
        with suppress(OSError):
            print(json.dumps({"command": args.command, "error": text, "type": kind, "exit_code": code}, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
