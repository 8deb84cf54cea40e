"""`stratavit train` on a tiny image folder: recipe files and flags, interruption and resumption, mistakes."""

import os
import shutil
import signal

import pytest
from command_line import make_folder, output, refusal
from helpers import CLASSES, make_net

import stratavit
from stratavit.cli import train as train_module
from stratavit.cli.parser import main, parsers
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
NAMES = [str(name) for name in range(CLASSES)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Seven classes of noise images, one of them unreadable, a super-network, a small model and a recipe."""
    folder = tmp_path_factory.mktemp("train")
    make_folder(folder / "data", NAMES, train=4, val=2)
    (folder / "data" / "train" / "3" / "1.png").write_bytes(b"no image")
    make_net("plain").save(folder / "run")
    stratavit.save(make_net("plain").extract(spec={"blocks.0.attn": 8}, verbose=False), folder / "small")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def arguments(work, *more, data=None, out=None, recipe=True):
    paths = {"--data": data or work / "data", "--device": "cpu"}
    paths |= {"--out": out} if out else {}
    paths |= {"--recipe": work / "recipe.toml"} if recipe else {}
    return ["train", str(work / "run"), *[str(part) for pair in paths.items() for part in pair], *more]


def test_train_and_then_extract(work, tmp_path, capsys):
    result = output(capsys, *arguments(work, "--epochs", "1", out=tmp_path / "out"))
    assert (result["steps"], result["images"]) == (3, 28)
    assert result["smallest_macs"] <= result["macs"]
    assert result["points"][0]["n"] == 14
    assert stratavit.SuperNet.load(tmp_path / "out").provenance["train"]["recipe"]["epochs"] == 1
    assert main(["extract", str(tmp_path / "out"), "--macs", "50%", "--out", str(tmp_path / "small")]) == 0


def test_terminated_and_resumed(work, tmp_path, capsys, monkeypatch):
    assert main(arguments(work, out=tmp_path / "uncut")) == 0
    read, reads = augmentation.TrainingFolder.__getitem__, []

    def killed(self, index):
        reads.append(index)
        if len(reads) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, index)

    monkeypatch.setattr(augmentation.TrainingFolder, "__getitem__", killed)
    assert main(arguments(work, out=tmp_path / "out")) == 143
    assert "after step 4 of 6; resume" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(arguments(work, "--resume", out=tmp_path / "out")) == 0
    for name in ("model.safetensors", "moments.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes()


def test_a_run_is_resumed_by_its_folder_alone(work, tmp_path, capsys, monkeypatch):
    """Model, images and head are those of the command that began it, from wherever it is resumed."""
    short = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--tracker", "none", "--device", "cpu"]
    monkeypatch.chdir(work)
    begun = {
        "train": ["train", "run", "--data", "data", "--recipe", "recipe.toml", "--device", "cpu"],
        "finetune": ["finetune", "small", "--data", "data", "--new-head", *short],
    }
    for command, words in begun.items():
        out = str(tmp_path / command)
        assert main([*words, "--out", out]) == 0
        monkeypatch.chdir(tmp_path)
        again = output(capsys, command, "--resume", out, "--device", "cpu")
        assert again["steps"] == run_files.read_state(tmp_path / command)["step"]
        monkeypatch.chdir(work)
    without = run_files.read_state(tmp_path / "train") | {"origin": {}}
    run_files.write_state(tmp_path / "train", without)
    assert "give RUN" in refusal(capsys, "train", "--resume", tmp_path / "train")
    assert "--data" in refusal(capsys, "train", work / "run", "--out", tmp_path / "other")


def test_processes_that_are_not_the_first_print_nothing(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "leave_process_group", lambda: None)
    monkeypatch.setenv("RANK", "1")
    options = ["--data", work / "data", "--device", "cpu", "--workers", "0", "--tracker", "none", "--epochs", "1"]
    options += ["--batch-size", "8", "--json"]
    for command, target, *own in (("train", "run", "--list-epochs", "1", "--repeats", "1"), ("finetune", "small")):
        assert main([*map(str, [command, work / target, "--out", tmp_path / command, *options, *own])]) == 0
    assert capsys.readouterr().out == ""


def test_flags_win_over_the_file(work):
    recipe = recipe_of(parsers()[0].parse_args(arguments(work, "--lr", "0.5", "--sampling", "budget")))
    assert (recipe.lr, recipe.sampling, recipe.epochs) == (0.5, "budget", 2)


def test_every_key_is_a_flag(work):
    defaults = Recipe().to_dict()
    flags = [text for key in field_types() for text in (f"--{key.replace('_', '-')}", str(defaults[key]))]
    assert recipe_of(parsers()[0].parse_args(arguments(work, *flags, recipe=False))) == Recipe()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--list-epochs", "3"], "list_epochs (3)"),
        (["--batch-size", "40"], "28 images are fewer than the 40"),
        (["--resume"], "no interrupted training"),
        (["--resume", "elsewhere"], "leave out --out"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--tracker", "comet_ml"], "'comet_ml'"),
        (["--device", "cuda:3"], "CUDA_VISIBLE_DEVICES"),
        (["--teacher-weights", "x.safetensors"], "--teacher MODEL"),
    ],
)
def test_mistakes(work, tmp_path, capsys, more, expected):
    assert expected in refusal(capsys, *arguments(work, *more, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "state.pt").exists()


def test_the_folder_of_a_run(work, tmp_path, capsys):
    once = arguments(work, "--epochs", "1", data=work / "data" / "train", out=tmp_path / "out")
    assert main(once) == 0
    captured = capsys.readouterr()
    assert "trained 3 steps on 28 images" in captured.out
    assert "1.png is unreadable" in captured.err
    assert not (tmp_path / "out" / "curve.csv").exists()  # no folder is held out
    assert "is not empty" in refusal(capsys, *once)
    (tmp_path / "out" / "mine.txt").touch()
    assert main([*once, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    without = arguments(work, "--epochs", "1", data=work / "data" / "train")
    assert main([*without, "--resume", str(tmp_path / "out")]) == 0
    assert "--out" in refusal(capsys, *without)
    assert str(work / "run") in refusal(capsys, *arguments(work, "--overwrite", out=work / "run"))
    assert stratavit.SuperNet.load(work / "run").sites


def test_class_folders_must_be_the_same(work, tmp_path, capsys):
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "3").rename(tmp_path / "data" / "val" / "three")
    assert "'3'" in refusal(capsys, *arguments(work, data=tmp_path / "data", out=tmp_path / "out"))


def test_a_resumed_run_refuses_another_recipe(work, tmp_path, capsys):
    run_files.write_state(tmp_path, {"recipe": Recipe().to_dict()})
    line = refusal(capsys, *arguments(work, "--resume", "--lr", "0.5", recipe=False, out=tmp_path))
    assert "lr = 0.0005" in line
    assert "0.5" in line
