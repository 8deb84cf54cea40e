"""Folders of many layouts: which images are found, of which class, of which split, and what is reported or refused."""

import pytest
from image_folders import labels_of, write

from stratavit import StrataViTError
from stratavit.data import image_files
from stratavit.data.image_files import in_natural_order

LAYOUTS = {
    "nested": (["val/cat/indoor/0.png", "val/cat/outdoor/0.png", "val/dog/indoor/0.png"], [0, 0, 1]),
    "deep": (["val/a/0.png", "val/a/x/y/z/0.png", "val/b/0.png"], [0, 0, 1]),
    "no splits": (["a/0.png", "b/0.png"], [0, 1]),
    "a class that is called as a split": (["val/train/0.png", "val/bus/0.png"], [1, 0]),
    "numbers": (["val/2/0.png", "val/10/0.png", "val/1/0.png"], [1, 2, 0]),
    "alike but for the case": (["val/A/0.png", "val/a/0.png", "val/b/0.png"], [0, 1, 2]),
    "train of Tiny-ImageNet": (["train/n1/images/0.JPEG", "train/n2/images/0.JPEG"], [0, 1]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_class_is_the_folder_below_the_split(tmp_path, name):
    paths, labels = LAYOUTS[name]
    found = labels_of(write(tmp_path, *paths), "train" if paths[0].startswith("train/") else "val")
    assert found == dict(zip(paths, labels, strict=True))


@pytest.mark.parametrize("aside", [".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", "a/@eaDir/1.png", "a/._0.png"])
def test_hidden_and_tool_folders_are_left_out_with_a_count(tmp_path, capsys, aside):
    write(tmp_path, "train/a/0.png", "train/b/0.png", f"train/{aside}")
    assert labels_of(tmp_path, "train") == {"train/a/0.png": 0, "train/b/0.png": 1}
    assert "left out 1 hidden" in capsys.readouterr().err


def test_what_is_passed_over_is_reported_by_its_ending(tmp_path, capsys):
    write(tmp_path / "val", "a/0.png", "a/0.heic", "a/1.HEIC", "a/list", "b/x.txt", "0.png", "c.csv")
    assert labels_of(tmp_path) == {"val/a/0.png": 0}
    said = capsys.readouterr().err
    for words in (".heic 2", "no ending 1", ".txt 1", ".csv 1", "1 class folders", "(b)", "1 images", "0.png"):
        assert words in said
    assert said.count("\n") == 4


REFUSED = {
    "Tiny-ImageNet's val": (["val/images/0.png", "val/val_annotations.txt"], r"images, and val_annotations\.txt"),
    "no class folders": (["val/0.png", "val/1.png"], "2 images .* if val"),
    "splits below": (["set/train/a/0.png", "set/val/a/0.png"], "set holds .*/, .*/"),
    "splits below the classes": (["a/train/0.png", "a/test/0.png", "b/train/0.png"], "train/a"),
    "other names of splits": (["training_set/cats/0.png", "test_set/cats/0.png"], "_set looks like a split"),
    "a data set two levels below": (
        ["sets/flowers/train/a/0.png", "sets/flowers/val/a/0.png"],
        "flowers holds .*/, .*/",
    ),
    "a data set of one split below": (["flowers/train/a/0.png"], "flowers looks like"),
    "splits named at the end": (["cats-train/a/0.png", "cats-val/a/0.png"], "cats-.*/ and cats-.*/"),
    "no images": (["val/a/0.txt"], r"\.txt 1"),
    "a drawing": (["val/a/0.eps"], r"\.eps 1"),
    "the other split only": (["Train/a/0.png"], "no val/"),
    "two names": (["val/a/0.png", "validation/a/0.png"], "val/ and validation/"),
    "another split's class": (["train/n1/images/0.JPEG", "test/images/0.JPEG"], "images is not among"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_refused(tmp_path, name):
    paths, words = REFUSED[name]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(StrataViTError, match=words) as caught:
        labels_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "TRAINING", "val", "Valid", "VALIDATION", "Test", "testing"])
def test_names_of_the_splits(tmp_path, capsys, name):
    write(tmp_path, f"{name}/a/0.png", "notes/x/0.png")
    assert [*labels_of(tmp_path, "train" if name.lower().startswith("train") else "val")] == [f"{name}/a/0.png"]
    assert str(tmp_path / name) in capsys.readouterr().err


def test_of_two_splits_to_measure_on_the_first_is_read_and_the_other_named(tmp_path, capsys):
    write(tmp_path, "valid/a/0.png", "Test/a/0.png", "Test/b/0.png")
    assert [*labels_of(tmp_path)] == ["valid/a/0.png"]
    assert "Test/ not used" in capsys.readouterr().err
    with pytest.raises(StrataViTError, match=r"split: .* got 'test'"):
        labels_of(tmp_path, "test")


def test_the_log_is_of_the_first_process_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    labels_of(write(tmp_path, "val/a/0.png"))
    assert capsys.readouterr().err == ""


def test_classes_may_be_called_like_the_end_of_a_split(tmp_path):
    """Folders of images are classes, whatever their names end with; and so are those of different beginnings."""
    write(tmp_path, "crash_test/0.png", "crash_train/0.png", "acid_test/x/0.png", "wagon_train/x/0.png")
    assert [*labels_of(tmp_path).values()] == [0, 1, 2, 3]


def test_natural_order():
    assert in_natural_order({"b", "a10", "a9", "A1", "²", "a"}) == ["a", "A1", "a9", "a10", "b", "²"]


def test_the_work_of_listing_grows_with_images_not_with_their_square(tmp_path, monkeypatch):
    whole, asked = image_files._natural_key, []
    monkeypatch.setattr(image_files, "_natural_key", lambda name: asked.append(name) or whole(name))
    write(tmp_path, *(f"train/c{number}/0.png" for number in range(40)))
    image_files.list_images(tmp_path / "train")
    assert len(asked) <= 5 * 40
