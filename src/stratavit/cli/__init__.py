"""The command line."""

from stratavit.cli.parser import main

__all__ = ["main"]
