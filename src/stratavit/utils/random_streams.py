"""Random numbers that follow from a few numbers alone, so that no state of a generator need be kept."""

from __future__ import annotations

import random


def stream(*numbers: int | str) -> random.Random:
    """A generator that depends on these numbers only, whatever the platform: seed, step, process, ..."""
    return random.Random("/".join(str(number) for number in numbers))  # a text is hashed by SHA-512
