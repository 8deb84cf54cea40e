"""Numbers as people write them."""

from __future__ import annotations

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def human(count: float) -> str:
    """A count with a unit: 1.08G, 5.72M."""
    for suffix in ("T", "G", "M", "K"):
        if abs(count) >= SUFFIXES[suffix]:
            return f"{count / SUFFIXES[suffix]:.4g}{suffix}"
    return f"{count:g}"
