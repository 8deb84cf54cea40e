"""Writes docs/cli.md from the command line's own parsers.

    python docs/tools/cli_page.py

A test compares the page with what this makes of them, so it cannot fall behind `--help`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stratavit.cli.parser import COMMANDS, parsers

PAGE = Path(__file__).parents[1] / "cli.md"
HEAD = """# Command line

Generated from the parsers by `python docs/tools/cli_page.py`; every command prints the same with `--help`.

With `--json` a command prints one JSON object instead of text; if it fails, one with `error`, `type` and `exit_code`.
Exit codes are 0 for success, 2 for wrong input, which
is reported in one line, 130 after Ctrl-C and 143 after SIGTERM. A budget is a share of the dense model (`50%`, `0.5`)
or a count (`2.1G`): [choosing a budget](budgets.md). [Folders of images](files.md#folders-of-images) describes what
`--data` accepts and how class folders are numbered, [Recipe](api.md#stratavit.Recipe) every key of a recipe.
"""
PLAIN_DEFAULTS = {"--workers": "one per core, four at most"}  # depend on the machine


def page() -> str:
    """The page as markdown."""
    return HEAD + "".join(command(name, sub, summary) for name, sub, summary in commands())


def commands() -> list[tuple[str, argparse.ArgumentParser, str]]:
    """Name, parser and summary of every command."""
    return [(name, sub, COMMANDS[name][1]) for name, sub in parsers()[1].items()]


def command(name: str, sub: argparse.ArgumentParser, summary: str) -> str:
    """The section of one command: a table for each group of its options."""
    actions = [action for action in sub._actions if not isinstance(action, argparse._HelpAction)]
    positional = " ".join(_metavar(action) for action in actions if not action.option_strings)
    text = f"\n## {name}\n\n`stratavit {name}{' ' if positional else ''}{positional}`: {summary}.\n"
    for group in sub._action_groups:
        rows = [row(action) for action in group._group_actions if action in actions]
        if not rows:
            continue
        if group.title not in ("positional arguments", "options"):
            about = f": {group.description}" if group.description else ""
            text += f"\n{(group.title or '').capitalize()}{about}.\n"
        what = "option | what it does" if group.title != "positional arguments" else "argument | what it is"
        text += f"\n| {what} |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text


def row(action: argparse.Action) -> str:
    """One option and what it does."""
    value = _metavar(action) if action.nargs != 0 else ""
    if action.nargs == "?" and action.option_strings:
        value = f"[{value}]"
    names = ", ".join(action.option_strings) or value
    shown = f"{names} {value}" if action.option_strings and value else names
    about = (action.help or "") % {**vars(action), "prog": "stratavit"}
    if names in PLAIN_DEFAULTS and not about.startswith("(default:"):  # a recipe's default is a constant
        about = f"{about.partition(' (default:')[0]} (default: {PLAIN_DEFAULTS[names]})"
    if action.required and action.option_strings:
        about += " (required)"
    cells = (f"`{shown}`", about)
    return "| " + " | ".join(cell.replace("|", " or ") for cell in cells) + " |"  # a bar would end the cell


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return action.dest.removeprefix("recipe_").upper()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
