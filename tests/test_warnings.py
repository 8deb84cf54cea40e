"""Deprecations are errors in tests, wherever a library attributes them to."""

import builtins
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import make_model

from stratavit import export

DEPRECATIONS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)


@pytest.mark.parametrize("category", DEPRECATIONS)
def test_a_deprecation_that_a_library_attributes_to_itself_is_an_error(category):
    """With stacklevel 1, which a filter by our module does not see."""
    library = {"__name__": "torch.somewhere", "category": category}
    code = "import warnings\ndef old():\n    warnings.warn('old is deprecated', category)\n"
    exec(compile(code, "torch/somewhere.py", "exec"), library)
    with pytest.raises(category, match="old"):
        library["old"]()


def test_the_same_in_a_process_that_a_test_starts():
    code = f"""
import warnings
for category in ({", ".join(category.__name__ for category in DEPRECATIONS)}):
    try:
        warnings.warn_explicit("old", category, "torch.py", 1, module="torch")
    except category:
        print("raised")
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["raised"] * len(DEPRECATIONS)


def test_what_libraries_say_to_one_another_is_let_through_here_and_there(request):
    ignored = [rule.split(":") for rule in request.config.getini("filterwarnings") if rule.startswith("ignore")]
    assert ignored
    for _, start, category in ignored:  # a pattern to pytest and plain text to Python: it has to mean the same
        warnings.warn(f"{start} and more", getattr(builtins, category), stacklevel=1)
    assert os.environ["PYTHONWARNINGS"].count("ignore:") == len(ignored)


def test_an_export_hides_the_exporter_s_warnings_and_none_of_ours(tmp_path, monkeypatch):
    """What it warns about itself is no matter of the user; what our call does wrong is one of ours."""
    real = torch.export.export

    def export_with(stacklevel):
        def old(*args, **kwargs):
            warnings.warn("old is deprecated", DeprecationWarning, stacklevel=stacklevel)
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.export, "export", old)
        return export(make_model("plain"), tmp_path / f"{stacklevel}.pt2", "torch")

    assert export_with(1).images > 0
    with pytest.raises(DeprecationWarning, match="old"):
        export_with(2)
