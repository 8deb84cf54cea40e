"""Every command line of README and docs runs, and every program that needs a reader's files, on a small model.

What differs from what a reader types: the model is small and its weights are random, there are ten classes of two
images, training takes one epoch, timings are short and of PyTorch alone, the hub is on this machine, and training is
not started through a launcher. `stratavit demo`, launchers and other runtimes have tests of their own.
"""

import shlex
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from fake_hub import fake_hub
from helpers import enliven
from PIL import Image
from test_docs import BLOCKS, ROOT, STRATAVIT
from torch.utils.data import TensorDataset

import stratavit
from stratavit.cli.parser import main
from stratavit.data.image_folder import image_loader

MODEL = "deit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
ONE_EPOCH = ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
SHORT = {
    "bench": ["--seconds", "0.01", "--runtimes", "eager"],
    "train": [*ONE_EPOCH, "--list-epochs", "1", "--repeats", "1", "--proxy-images", "8", "--precision", "no"],
    "finetune": ONE_EPOCH,
}
LINES = [
    pytest.param([line for line in lines if line.startswith("stratavit")], id=f"{page.name}-{number}")
    for number, (page, match) in enumerate(BLOCKS)
    if match["language"] == "console"
    for lines in [STRATAVIT.sub("stratavit ", match["code"]).splitlines()]
    if any(line.startswith("stratavit") for line in lines) and "stratavit demo" not in match["code"]
]
PROGRAMS = [pytest.param(match["code"], id=page.name) for page, match in BLOCKS if match["stage"]]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def stage(tmp_path_factory, small_models):
    """What a reader has by then: images, a super-network, a small model, a curve."""
    folder = tmp_path_factory.mktemp("stage")
    generator = torch.Generator().manual_seed(0)
    for data, classes in (("imagenet", 10), ("flowers", 4)):
        for split, name in ((split, f"class{number}") for split in ("train", "val") for number in range(classes)):
            (folder / data / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / data / split / name / f"{number}.png")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["convert", MODEL, "--data", "imagenet", "--out", "run"]) == 0
        assert main(["extract", "run", "--macs", "50%", "--out", "small"]) == 0
    return folder


@pytest.fixture
def reader(stage, tmp_path, monkeypatch):
    """A copy of the stage to be in, and a hub that answers there."""
    shutil.copytree(stage, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    with fake_hub() as hub:
        monkeypatch.setitem(SHORT, "push", ["--endpoint", hub.url])
        yield hub


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.usefixtures("reader")
def test_command_lines_run(lines):
    for line in lines:
        arguments = shlex.split(line)[1:]
        for option, value in pairwise(arguments):
            if option == "--out":  # lines of a block that write to one name are alternatives
                shutil.rmtree(value, ignore_errors=True)
        eased = ["--latency", "60000"] if "--latency" in arguments else []  # ms: this machine may be busy
        assert main([*arguments, *eased, *SHORT.get(arguments[0], [])]) == 0, line


@pytest.mark.parametrize("code", PROGRAMS)
def test_programs_run(code, reader, monkeypatch, tmp_path):
    here = partial(stratavit.from_pretrained, endpoint=reader.url, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(stratavit, "from_pretrained", here)
    data_config = stratavit.SuperNet.load("run").data_config
    batches = {split: list(image_loader("imagenet", data_config, split, 10)) for split in ("train", "val")}
    images, labels = batches["train"][0]
    shutil.rmtree("small")
    reader.repos["user/name"] = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    given = {
        "loader": batches["train"],
        "train_data": TensorDataset(images, labels),
        "val_data": batches["val"],
        "proxy_loader": batches["train"],
    }
    for long, short in (
        ("list_epochs=20", "list_epochs=1"),
        (" epochs=100", " epochs=1"),
        ("batch_size=256", "batch_size=4, workers=0"),
    ):
        code = code.replace(long, short)
    exec(compile(code, "block", "exec"), given)
