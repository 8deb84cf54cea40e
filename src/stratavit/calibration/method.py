"""The two methods: ``default``, and ``paper``, exactly the paper."""

from __future__ import annotations

from typing import Literal

from stratavit.errors import StrataViTError, described

Method = Literal["default", "paper"]


def known_method(method: Method) -> Method:
    """The method, if it is one.

    Raises:
        StrataViTError: It is not.
    """
    if method not in ("default", "paper"):
        raise StrataViTError(f"method: expected 'default' or 'paper', got {described(method)}")
    return method
