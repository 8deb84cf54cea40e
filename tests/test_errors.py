"""Errors are one printable sentence, whatever files and other libraries put into them."""

import pytest

from stratavit import Spec, StrataViTError
from stratavit.errors import described, one_line, shown


def test_values_and_sentences_of_others_fit_into_one_line():
    assert described([10**5000]) == "a very large list"
    assert one_line(ValueError("a\x00b\ud800c\nsecond line")) == r"a\x00b\ud800c"
    assert one_line(ValueError()) == "ValueError"
    assert shown("blocks.0\n" * 99) == (r"blocks.0\n" * 99)[:200]


def test_a_spec_of_something_else():
    with pytest.raises(StrataViTError, match=r"spec: .*int"):
        Spec(5)
    assert repr(Spec({"a": 1})) == "Spec({'a': 1})"
