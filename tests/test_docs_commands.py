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
from command_line import MODEL, make_folder, small_models
from fake_hub import fake_hub
from test_docs import BLOCKS, ROOT, STRATAVIT
from torch.utils.data import TensorDataset

import stratavit
from stratavit.cli.parser import main
from stratavit.data.image_folder import image_loader

ONE_EPOCH = ["--epochs", "1", "--batch-size", "4", "--workers", "0"]
SHORT = {
    "bench": ["--seconds", "0.01", "--runtimes", "eager"],
    "train": [*ONE_EPOCH, "--list-epochs", "1", "--repeats", "1", "--proxy-images", "8", "--precision", "no"],
    "finetune": ONE_EPOCH,
    "recover": ["--batch-size", "4", "--steps", "2", "--minutes", "2"],
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
def stage(tmp_path_factory):
    """What a reader has by then: images, a super-network, a small model."""
    folder = tmp_path_factory.mktemp("stage")
    for data, classes in (("imagenet", 10), ("flowers", 4)):
        make_folder(folder / data, [f"class{number}" for number in range(classes)], train=2, val=2)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch, small_models():
        patch.chdir(folder)
        assert main(["convert", MODEL, "--data", "imagenet", "--out", "run"]) == 0
        assert main(["extract", "run", "--macs", "50%", "--out", "small"]) == 0
        patch.undo()
        yield folder


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
        ('"epochs": 5', '"epochs": 1, "workers": 0'),
        ("minutes=25", "minutes=2, steps=2, config={'batch_size': 4}"),
    ):
        code = code.replace(long, short)
    exec(compile(code, "block", "exec"), given)
