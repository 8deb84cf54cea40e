"""The command line in tests: a small model under timm's name, folders of noise images, commands and their output."""

import json
from contextlib import contextmanager

import pytest
import timm
import torch
from helpers import enliven
from PIL import Image

from stratavit.cli.parser import main

MODEL = "deit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


@contextmanager
def small_models():
    """timm's name stands for a small model, with weights of its own where pretrained ones are asked for."""
    entries = timm.models._registry._model_entrypoints
    stock = entries[MODEL]

    def small(pretrained=False, **options):
        options = {**TINY, **options}
        fetched = pretrained and (options.get("pretrained_cfg") or {}).get("file")
        model = stock(pretrained=bool(fetched), **options)
        return enliven(model) if pretrained and not fetched else model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(entries, MODEL, small)
        yield


def make_folder(root, classes, **counts):
    """A folder of noise images: so many of every class in each split, such as ``train=3, val=2``."""
    generator = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    return root


def output(capsys, *arguments):
    """Runs a command with --json: stdout must be one JSON object and nothing else."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments, code=2):
    """Runs a command that must fail with one line on standard error; returns the line."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    notes = ("data: ", "left out ")  # of the images read until then
    lines = [line for line in captured.err.splitlines() if not line.startswith(notes)]
    assert len(lines) == 1, captured.err
    return lines[0]
