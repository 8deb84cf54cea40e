"""Help and mistakes: at once, in one line, in the words of the command line."""

import re
import subprocess
import sys

import pytest

from stratavit.cli import arguments, train_options
from stratavit.cli.parser import COMMANDS, main, parsers
from stratavit.cli.train_options import key_texts
from stratavit.cli.wording import in_options
from stratavit.training.recipe import field_types

SLOW = ("torch", "timm", "numpy", "matplotlib", "PIL", "rich", "safetensors")


def test_options_are_known_before_anything_slow_is_imported():
    code = f"import sys; from stratavit.cli.parser import parsers; parsers(); print({{*{SLOW}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_command_has_options_of_its_own():
    assert all(hasattr(arguments, f"{name}_options") or hasattr(train_options, f"{name}_options") for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convrt"], "'convrt' .* convert"),
        (["extract", "run", "--maks", "50%"], "--maks.* --macs"),
        (["extract", "run", "--maks=50%", "--out", "x"], "--maks.* --macs"),
        (["train", "run", "--bacth-size", "8"], "--bacth-size.* --batch-size"),
        (["finetune", "small", "--reduction", "0.5"], "--reduction"),  # a key without effect there
        (["--verison"], "--verison.* --version"),
        (["extract"], "RUN"),
        (["qqqqqq"], "not a command; see"),
    ],
)
def test_misspelt_words(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert "--help" in line


def test_beginnings_of_options_are_options():
    parser, _ = parsers()
    assert parser.parse_args(["extract", "run", "--mac=50%", "--out", "x"]).macs == "50%"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("lower batch_size or accumulate", "lower --batch-size or accumulate"),
        ("list_epochs (3) must not exceed epochs (2)", "--list-epochs (3) must not exceed --epochs (2)"),
        ("data: /a/data has no train/", "--data: /a/data has no train/"),
        ("no usable data: expected <class>/<image>", "no usable data: expected <class>/<image>"),
        ("lr must be at least 0, got -1", "--lr must be at least 0, got -1"),
        ("/a/batch_size/x is no folder: the data differ", "/a/batch_size/x is no folder: the data differ"),
    ],
)
def test_errors_name_options(message, shown):
    assert in_options(message, parsers()[1]["train"]) == shown


def test_every_key_of_a_recipe_has_a_text():
    assert key_texts().keys() >= field_types().keys()
    assert all(len(text) > 10 for text in key_texts().values())
