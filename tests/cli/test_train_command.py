"""`stratavit train` on a tiny image folder: recipe files and flags, interruption and resumption, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import CLASSES, make_net
from PIL import Image

import stratavit
from stratavit.cli.parser import main, parser
from stratavit.cli.train import recipe_of
from stratavit.training import augmentation, run_files
from stratavit.training.recipe import Recipe, field_types

RECIPE = """
epochs = 2
list_epochs = 1
batch_size = 8
lr = 0.02
repeats = 1
ema_horizon = 0.5
workers = 0
tracker = "none"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Seven classes of noise images, one of them unreadable, a super-network and a recipe."""
    folder = tmp_path_factory.mktemp("train")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in range(CLASSES):
            (folder / "data" / split / str(name)).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / "data" / split / str(name) / f"{number}.png")
    (folder / "data" / "train" / "3" / "1.png").write_bytes(b"no image")
    make_net("plain").save(folder / "run")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def command(work, out, *more):
    paths = {"--data": work / "data", "--out": out, "--recipe": work / "recipe.toml", "--device": "cpu"}
    return ["train", str(work / "run"), *[str(part) for pair in paths.items() for part in pair], *more]


def complaint(capsys, arguments, code=2):
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def test_train_and_then_extract(work, tmp_path, capsys):
    assert main([*command(work, tmp_path / "out"), "--epochs", "1", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "1.png is unreadable" in captured.err
    assert (result["steps"], result["images"]) == (3, 28)
    assert result["smallest_macs"] <= result["macs"]
    assert result["points"][0]["n"] == 14
    assert stratavit.SuperNet.load(tmp_path / "out").provenance["train"]["recipe"]["epochs"] == 1
    assert main(["extract", str(tmp_path / "out"), "--macs", "50%", "--out", str(tmp_path / "small")]) == 0


def test_terminated_and_resumed(work, tmp_path, capsys, monkeypatch):
    assert main(command(work, tmp_path / "whole")) == 0
    read, reads = augmentation.TrainingFolder.__getitem__, []

    def killed(self, index):
        reads.append(index)
        if len(reads) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index)

    monkeypatch.setattr(augmentation.TrainingFolder, "__getitem__", killed)
    error = complaint(capsys, command(work, tmp_path / "out"), 143)
    assert "stopped after step 4 of 6; resume" in error
    monkeypatch.undo()
    assert main([*command(work, tmp_path / "out"), "--resume"]) == 0
    for name in ("model.safetensors", "moments.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_a_held_out_folder_nothing_is_evaluated(work, tmp_path, capsys):
    arguments = command(work, tmp_path / "out", "--epochs", "1")
    arguments[arguments.index("--data") + 1] = str(work / "data" / "train")
    assert main(arguments) == 0
    assert "trained 3 steps on 28 images" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curve.csv").exists()


def test_flags_override_the_file(work):
    args = parser().parse_args(command(work, "out", "--lr", "0.5", "--sampling", "budget"))
    recipe = recipe_of(args)
    assert (recipe.lr, recipe.sampling, recipe.epochs) == (0.5, "budget", 2)


def test_every_key_is_a_flag(work):
    defaults = Recipe().to_dict()
    flags = [text for key in field_types() for text in (f"--{key.replace('_', '-')}", str(defaults[key]))]
    arguments = command(work, "out", *flags)
    del arguments[arguments.index("--recipe") : arguments.index("--recipe") + 2]
    assert recipe_of(parser().parse_args(arguments)) == Recipe()


def test_help_tells_defaults(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    assert "(default: 0.99996)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--list-epochs", "3"], r"list_epochs (3) must not exceed epochs (2)"),
        (["--batch-size", "40"], "28 images are fewer than the 40 of one step"),
        (["--resume"], "holds no interrupted training"),
        (["--resume", "elsewhere"], "leave out --out"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--tracker", "comet_ml"], "tracker 'comet_ml' is not installed"),
        (["--device", "cuda:3"], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_mistakes(work, tmp_path, capsys, more, message):
    assert message in complaint(capsys, command(work, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "state.pt").exists()


def test_the_folder_of_a_run(work, tmp_path, capsys):
    arguments = command(work, tmp_path / "out", "--epochs", "1")
    assert main(arguments) == 0
    assert "is not empty" in complaint(capsys, arguments)
    (tmp_path / "out" / "mine.txt").touch()
    assert main([*arguments, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    at = arguments.index("--out")
    without = [*arguments[:at], *arguments[at + 2 :]]
    assert main([*without, "--resume", str(tmp_path / "out")]) == 0
    assert "give the folder of the run" in complaint(capsys, without)
    onto_itself = [*without, "--out", str(work / "run"), "--overwrite"]
    assert "is what the run starts from" in complaint(capsys, onto_itself)
    assert stratavit.SuperNet.load(work / "run").sites


def test_class_folders_must_be_the_same(work, tmp_path, capsys):
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "3").rename(tmp_path / "data" / "val" / "three")
    arguments = command(work, tmp_path / "out")
    arguments[arguments.index("--data") + 1] = str(tmp_path / "data")
    assert "class folders differ, '3'" in complaint(capsys, arguments)


def test_a_resumed_run_refuses_another_recipe(work, tmp_path, capsys):
    run_files.write_state(tmp_path, {"recipe": Recipe().to_dict()})
    arguments = command(work, tmp_path, "--resume", "--lr", "0.5")
    del arguments[arguments.index("--recipe") : arguments.index("--recipe") + 2]
    assert "trained with lr = 0.0005; a resumed run cannot make it 0.5" in complaint(capsys, arguments)


def test_accelerate_is_not_needed_to_import():
    source = "import sys; sys.modules['accelerate'] = None; import stratavit.cli"
    subprocess.run([sys.executable, "-c", source], check=True)
