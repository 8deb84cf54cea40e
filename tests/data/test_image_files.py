"""Folders of many layouts: which images are found, of which class, of which split, and what is told or refused."""

import os

import pytest
from PIL import Image

from stratavit import StrataViTError, image_loader
from stratavit.data.image_files import in_natural_order
from stratavit.data.image_reading import endings

CONFIG = {"input_size": (3, 8, 8)}


def write(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if os.path.splitext(path)[1].lower() in endings():
            Image.new("RGB", (8, 8)).save(root / path)
        else:
            (root / path).write_text("something")
    return root


def found(root, split="val"):
    """Path in the data set -> label."""
    loader = image_loader(root, CONFIG, split, None)
    return {os.path.relpath(path, root).replace(os.sep, "/"): label for path, label in loader.dataset.samples}


# ---- layouts ----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "plain": (["val/a/0.png", "val/b/0.jpg"], [0, 1]),
    "nested": (["val/cat/indoor/0.png", "val/cat/outdoor/0.png", "val/dog/indoor/0.png"], [0, 0, 1]),
    "the same name inside": (["val/a/images/0.png", "val/b/images/0.png"], [0, 1]),
    "the name of another class inside": (["val/a/b/0.png", "val/b/0.png"], [0, 1]),
    "deep": (["val/a/x/y/z/0.png", "val/b/0.png"], [0, 1]),
    "both depths": (["val/a/0.png", "val/a/more/1.png", "val/b/0.png"], [0, 0, 1]),
    "no splits": (["a/0.png", "b/0.png"], [0, 1]),
    "a class that is called as a split": (["val/train/0.png", "val/bus/0.png"], [1, 0]),
    "numbers": (["val/2/0.png", "val/10/0.png", "val/1/0.png"], [1, 2, 0]),
    "numbers that are no digits": (["val/²/0.png", "val/a/0.png"], [1, 0]),
    "alike but for the case": (["val/A/0.png", "val/a/0.png", "val/b/0.png"], [0, 1, 2]),
    "blanks and signs": (["val/a b, c/0.png", "val/(d)/0.png"], [1, 0]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_class_is_the_folder_below_the_split(tmp_path, name):
    paths, labels = LAYOUTS[name]
    assert found(write(tmp_path, *paths)) == dict(zip(paths, labels, strict=True))


ASIDE = {
    "notebooks": "train/.ipynb_checkpoints/0.png",
    "a NAS": "train/@eaDir/0.png",
    "a Mac's archive": "train/__MACOSX/a/0.png",
    "a NAS in a class": "train/a/@eaDir/1.png",
    "a Mac's file": "train/a/._0.png",
    "Git": "train/.git/x.png",
}


@pytest.mark.parametrize("name", ASIDE)
def test_hidden_and_tool_folders_are_left_out_and_told(tmp_path, capsys, name):
    write(tmp_path, "train/a/0.png", "train/b/0.png", ASIDE[name])
    assert found(tmp_path, "train") == {"train/a/0.png": 0, "train/b/0.png": 1}
    assert "left out 1 hidden" in capsys.readouterr().err


def test_what_is_passed_over_is_told_by_its_ending(tmp_path, capsys):
    write(tmp_path / "val", "a/0.png", "a/0.heic", "a/1.HEIC", "a/list", "b/x.txt", "0.png", "c.csv")
    assert found(tmp_path) == {"val/a/0.png": 0}
    told = capsys.readouterr().err
    for words in (
        ".heic 2",
        "no ending 1",
        ".txt 1",
        ".csv 1",
        "1 class folders hold no images",
        "(b)",
        "no class folder",
    ):
        assert words in told
    assert told.count("\n") == 4


REFUSED = {
    "Tiny-ImageNet's val": (["val/images/0.png", "val/val_annotations.txt"], "by that file"),
    "with its train": (["train/n1/images/0.png", "val/images/0.png", "val/val_annotations.txt"], "by that file"),
    "no class folders": (["val/0.png", "val/1.png"], "2 images in no class folder"),
    "a class in the place of a split": (["val/0.png", "b/0.png"], "if val is a class"),
    "splits below": (["set/train/a/0.png", "set/val/a/0.png"], "are splits"),
    "splits below the classes": (["a/train/0.png", "a/test/0.png", "b/train/0.png"], "put the splits above"),
    "other names of splits": (["training_set/cats/0.png", "test_set/cats/0.png"], "looks like a split"),
    "a year": (["train2017/a/0.png", "val2017/a/0.png"], "looks like a split"),
    "no images": (["val/a/0.txt"], r"others only \(.txt 1\)"),
    "the other split only": (["Train/a/0.png"], "has no val/ folder"),
    "two names": (["val/a/0.png", "validation/a/0.png"], "val/ and validation/, two names"),
    "two cases": (["val/a/0.png", "VAL/a/0.png"], "two names"),
    "two names of train": (["train/a/0.png", "Training/a/0.png", "val/a/0.png"], "two names"),
    "a drawing": (["val/a/0.eps"], "others only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_refused(tmp_path, name):
    paths, words = REFUSED[name]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(StrataViTError, match=words) as caught:
        found(tmp_path)
    assert "\n" not in str(caught.value)


def test_tiny_imagenets_train(tmp_path):
    write(tmp_path, "train/n1/images/0.JPEG", "train/n1/n1_boxes.txt", "train/n2/images/0.JPEG", "test/images/0.JPEG")
    assert found(tmp_path, "train") == {"train/n1/images/0.JPEG": 0, "train/n2/images/0.JPEG": 1}
    with pytest.raises(StrataViTError, match="images is not among the class folders of the training split"):
        found(tmp_path)


# ---- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "train"), ("train", "Train"), ("train", "TRAINING"),
        ("val", "val"), ("val", "Valid"), ("val", "VALIDATION"), ("val", "Test"), ("val", "testing"),
    ],
)  # fmt: skip
def test_names_of_the_splits(tmp_path, capsys, split, name):
    write(tmp_path, f"{name}/a/0.png", "notes/x/0.png")
    assert [*found(tmp_path, split)] == [f"{name}/a/0.png"]
    assert str(tmp_path / name) in capsys.readouterr().err


def test_of_two_splits_to_measure_on_the_first_is_taken_and_told(tmp_path, capsys):
    write(tmp_path, "valid/a/0.png", "Test/a/0.png", "Test/b/0.png")
    assert [*found(tmp_path)] == ["valid/a/0.png"]
    told = capsys.readouterr().err
    assert "valid" in told
    assert "Test/ not used" in told


def test_no_other_split(tmp_path):
    with pytest.raises(StrataViTError, match="split: expected 'train' or 'val'"):
        found(write(tmp_path, "test/a/0.png"), "test")


def test_the_log_is_of_the_first_process_alone(tmp_path, capsys, monkeypatch):
    write(tmp_path, "val/a/0.png")
    monkeypatch.setenv("RANK", "1")
    found(tmp_path)
    assert capsys.readouterr().err == ""


def test_natural_order():
    assert in_natural_order({"b", "a10", "a9", "A1", "²", "a"}) == ["a", "A1", "a9", "a10", "b", "²"]
