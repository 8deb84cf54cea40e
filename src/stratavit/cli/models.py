"""The command ``models``: what is supported, to what degree and why not more."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.table import Table

from stratavit.cli.options import Outcome
from stratavit.interop.supported import markdown, rows


def add_models_options(command: ArgumentParser) -> None:
    """What only this command takes."""
    command.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="timm names to look at, such as 'vit_*dinov3' (default: examples)"
    )
    command.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")


def models(args: Namespace) -> Outcome:
    """Table of what can be cut."""
    found = rows(args.pattern)
    if args.markdown:
        return {"models": found}, [markdown(found)]
    table = Table("models", "attention", "MLP", "why not more")
    for row in found:
        name = row["name"] if not row["models"] else f"{row['models']}\n{row['name']}"
        table.add_row(name, row["attention"], row["mlp"], row["reason"])
    return {"models": found}, [table]
