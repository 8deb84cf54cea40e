"""Help and mistakes: at once, in one line, in the words of the command line."""

import json
import re
import subprocess
import sys

import pytest

from stratavit.cli import arguments, train_options
from stratavit.cli.parser import COMMANDS, main, parsers
from stratavit.cli.train_options import key_texts
from stratavit.cli.wording import SYNONYMS, in_options
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
        (["extract", "run", "--flops", "50%"], "--flops.* --macs .*FLOPs"),
        (["extract", "run", "--val-images=50"], "--val-images.* --limit"),
        (["convert", "m", "--num-images", "50"], "--num-images.* --images"),
        (["curve", "run", "--force"], "--force.* --overwrite"),
        (["extract", "run", "--runtime", "onx"], "--runtime: 'onx' .*compiled.* mean onnx"),
        (["bench", "run", "--batches", "1,x"], "--batches: .*at least 1, got 'x'"),
        (["evaluate", "run", "--limit", "0"], "--limit: .*at least 1, got '0'"),
        (["bench", "run", "--seconds", "long"], "--seconds: .*number, got 'long'"),
        (["extract", "run", "--position", "1.5"], "--position: .*whole number, got '1.5'"),
        (["extract", "run", "--macs"], "--macs: .*value"),
    ],
)
def test_misspelt_words(words, said, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert re.search(said, line)
    assert "--help" in line


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["extract", "run", "--maks", "50%"], "extract"),
        (["evaluate", "run"], "evaluate"),
        (["curve", "run", "--data", "d", "--precision", "fp8"], "curve"),
        (["convrt"], None),
        ([], None),
    ],
)
def test_usage_errors_are_objects_under_json(words, command, capsys):
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["command"], found["type"], found["exit_code"]) == (command, "UsageError", 2)
    assert found["error"] in captured.err


def test_what_other_tools_call_an_option_is_none_of_ours():
    """A synonym stands in for an option that there is, and hides none."""
    known = {option for parser in parsers()[1].values() for option in parser._option_string_actions}
    assert not known & SYNONYMS.keys()
    assert {ours.partition(" ")[0] for names in SYNONYMS.values() for ours in names} <= known


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
