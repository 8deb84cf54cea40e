"""Mistakes on the command line in its own words: the nearest option, and options in the place of Python's names."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

PREFIX = "recipe_"  # of a recipe's keys among the arguments


class Parser(ArgumentParser):
    """Reports a mistake in one line; of `argparse` it would be preceded by all options."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: {message}{see} `{self.prog} --help`\n")


def check_spelling(words: Sequence[str], main: Parser, commands: Mapping[str, Parser]) -> None:
    """Ends the process at a word that is no command, or at an option that the command does not have."""
    if words and not words[0].startswith("-") and words[0] not in commands:
        main.error(f"{words[0]!r} is not a command{nearest(words[0], commands)}")
    parser = commands.get(words[0], main) if words else main
    known = list(parser._option_string_actions)
    for word in words:
        name = word.partition("=")[0]
        if name == "--":
            return
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            parser.error(f"there is no option {name}{nearest(name, known)}")


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
