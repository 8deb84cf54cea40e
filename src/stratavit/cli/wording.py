"""Mistakes on the command line in its own words: the nearest option, and options in the place of Python's names."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

PREFIX = "recipe_"  # of a recipe's keys among the arguments
SYNONYMS = {  # what other tools call an option -> ours, the first that a command has
    "--flops": ("--macs (one MAC is two FLOPs)",),
    "--gflops": ("--macs (one MAC is two FLOPs)",),
    "--mb": ("--memory",),
    "--ms": ("--latency",),
    "--acc": ("--top1",),
    "--accuracy": ("--top1",),
    "--drop": ("--max-drop",),
    "--val-images": ("--limit",),
    "--num-images": ("--limit", "--images"),
    "--samples": ("--limit", "--images"),
    "--bs": ("--batch-size",),
    "--force": ("--overwrite",),
    "--checkpoint": ("--weights",),
    "--pretrained": ("--weights",),
    "--jobs": ("--workers",),
    "--val-dir": ("--data",),
}
_PLAIN = (  # what argparse says of a value, and a sentence
    (r"invalid int value: (.*)", r"expected a whole number, got \1"),
    (r"invalid float value: (.*)", r"expected a number, got \1"),
    (r"expected one argument", "expected a value after it"),
    (r"the following arguments are required: (.*)", r"needs \1"),
)


class UsageError(Exception):
    """A command line that cannot be read: an unknown option, a missing argument, a value that is not one."""


class Parser(ArgumentParser):
    """Reports a mistake in one line; of `argparse` it would be preceded by all options, and end the process."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UsageError` that names the mistake and where help is."""
        message = message.removeprefix("argument ")
        for theirs, ours in _PLAIN:
            message = re.sub(theirs, ours, message)
        if (choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
            known = [word.strip().strip("'") for word in choice[2].split(",")]
            said = f"{choice[1]!r} is not one of {', '.join(known)}{nearest(choice[1], known)}"
            message = message[: choice.start()] + said
        see = " See" if message.endswith("?") else "; see"
        raise UsageError(f"{message}{see} `{self.prog} --help`")


def check_spelling(words: Sequence[str], main: Parser, commands: Mapping[str, Parser]) -> None:
    """Raises a `UsageError` at a word that is no command, or at an option that the command does not have."""
    if words and not words[0].startswith("-") and words[0] not in commands:
        main.error(f"{words[0]!r} is not a command{nearest(words[0], commands)}")
    parser = commands.get(words[0], main) if words else main
    known = list(parser._option_string_actions)
    for word in words:
        name = word.partition("=")[0]
        if name == "--":
            return
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            parser.error(f"there is no option {name}{_synonym(name, known) or nearest(name, known)}")


def _synonym(name: str, known: Sequence[str]) -> str:
    """Our option for what other tools call so, as the end of a sentence, if the command has it."""
    found = next((ours for ours in SYNONYMS.get(name, ()) if ours.partition(" ")[0] in known), None)
    return "" if found is None else f"; did you mean {found}?"


def nearest(word: str, known: Iterable[str]) -> str:
    """The words that a misspelt one may stand for, as the end of a sentence."""
    found = get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def in_options(message: str, parser: ArgumentParser) -> str:
    """A message with the options of a command in the place of Python's names for them.

    A name that is a word of English, too, is taken for one unless what follows says otherwise.
    """
    for action in parser._actions:
        option = next((option for option in action.option_strings if option.startswith("--")), None)
        name = action.dest.removeprefix(PREFIX)
        if option is None:
            continue
        follows = r"\b" if "_" in name else r"(?= must |=\S| = | \(\d)"
        message = re.sub(rf"^{name}(?=: )", option, message)
        message = re.sub(rf"(?<![\w/.-]){name}{follows}(?!/)", option, message)
    return message
