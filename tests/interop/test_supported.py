"""What is said to be supported is what the models themselves allow."""

import json
from pathlib import Path

import pytest

from stratavit import StrataViTError
from stratavit.cli.parser import main
from stratavit.interop.supported import markdown, rows, support_of

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_the_docs_is_generated():
    assert markdown(rows()) in (DOCS / "models.md").read_text()


def test_degrees_and_reasons():
    assert support_of("vit_tiny_patch16_224")[2:] == ("q, k, v", "yes", "")
    assert support_of("vit_small_patch16_dinov3").attention == "v"
    assert "norm between fc1 and fc2" in support_of("eva02_base_patch14_224").reason
    assert "ResNet" in support_of("resnet18").reason
    with pytest.raises(StrataViTError, match="no model that matches 'nothing'"):
        rows("nothing")


def test_the_command(capsys):
    assert main(["models", "vit_small*dinov3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {row["attention"] for row in found} == {"v"}
    assert main(["models", "deit_tiny_patch16_224"]) == 0
    assert "q, k, v" in capsys.readouterr().out
