"""Which class a folder is: by a class map, by the model's names, by the training split, by order."""

import os
import unicodedata

import pytest
import timm
import torch
from architectures import make
from image_folders import labels_of, write

import stratavit
from stratavit import StrataViTError, SuperNet, class_names_of
from stratavit.cli.parser import main
from stratavit.cli.train import new_head
from stratavit.data.class_names import full_names


def folders(root, *names):
    write(root, *(f"{name}/0.png" for name in names))


def numbers(root, **options):
    """Class folder of val -> the label that its images get."""
    return {os.path.dirname(path).removeprefix("val/"): label for path, label in labels_of(root, **options).items()}


# ---- names of the model ----------------------------------------------------------------------------------------

NAMES = ["dog", "great white shark, white shark", "Ant", "crane", "crane, machine", "0"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["dog", "Ant"], [0, 2]),
        (["white shark"], [1]),
        (["great_white_shark", "dog"], [1, 0]),
        (["Great White Shark, white shark"], [1]),
        (["machine"], [4]),
        (["crane"], [3]),  # the full name of one, a part of the other's
        (["0", "dog"], [5, 0]),
        (["dog", ".cache"], [0, None]),
    ],
)
def test_folders_called_as_the_model_calls_its_classes(tmp_path, found, expected):
    folders(tmp_path / "val", *found)
    labels = numbers(tmp_path, classes=6, class_names=NAMES)
    assert [labels.get(name) for name in found] == expected


@pytest.mark.parametrize(
    ("found", "names", "odd"),
    [
        (["dog", "tmp"], NAMES, "tmp"),
        (["b"], ["b", "b", "c"], "numbers 0, 1"),
        (["y"], ["x, y", "y, z"], "numbers 0, 1"),
        (["white shark", "great white shark"], NAMES, "class 1"),
    ],
)
def test_folders_that_the_names_leave_open(tmp_path, found, names, odd):
    folders(tmp_path / "val", *found)
    with pytest.raises(StrataViTError, match=odd):
        numbers(tmp_path, classes=len(names), class_names=names)


def test_names_that_fit_no_folder_leave_the_order_and_it_is_said(tmp_path, capsys):
    folders(tmp_path / "val", "n02", "n10", "n1")
    assert numbers(tmp_path, classes=3, class_names=["a", "b", "c"]) == {"n1": 0, "n02": 1, "n10": 2}
    assert "none of which the model names" in capsys.readouterr().err


# ---- class maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["b\na\n", "\ufeffb\r\na\r\n", "\n b \n\na\nc"])
def test_a_class_map_of_any_editor_wins_over_names_and_may_have_classes_without_a_folder(tmp_path, text):
    folders(tmp_path / "val", "a", "b")
    (tmp_path / "map.txt").write_bytes(text.encode())
    options = {"class_map": tmp_path / "map.txt", "class_names": ["a", "b"]}
    assert numbers(tmp_path, classes=2 + ("c" in text), **options) == {"a": 1, "b": 0}


@pytest.mark.parametrize("form", ["NFC", "NFD"])  # letters and their accents in one, and apart as macOS writes them
def test_names_that_look_alike_are_alike(tmp_path, form):
    ours, others = (unicodedata.normalize(way, "\u00c4ffchen") for way in (form, "NFC" if form == "NFD" else "NFD"))
    folders(tmp_path / "val", "Zebra", ours)
    (tmp_path / "map.txt").write_text(f"{others}\nZebra\n", encoding="utf-8")
    for options in ({"class_names": [others, "Zebra"]}, {"class_map": tmp_path / "map.txt"}):
        assert numbers(tmp_path, classes=2, **options) == {ours: 0, "Zebra": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"n1\nn2\nn3\n", r"n10 is not a class of .*map\.txt"),
        (b"a\nb\nc\n", "none of its class folders"),
        (b"n1\nn2\nn3\nn10\n", "4 classes in the class map.*3 classes"),
        (b"", "map.txt: is empty"),
        (b"a\nb\na\n", "'a' appears twice"),
        (b"\xff\xfe\xff", r"map\.txt: .*as text"),
        (None, r"map\.txt: cannot be read"),
    ],
)
def test_class_maps_that_do_not_fit(tmp_path, content, words):
    folders(tmp_path / "val", "n1", "n2", "n10")
    if content is not None:
        (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(StrataViTError, match=words):
        numbers(tmp_path, classes=3, class_map=tmp_path / "map.txt")


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "differs"),
    [
        (["1", "2", "10"], True),
        (["a", "B"], True),  # letters in any case alike, as timm has them
        (["01", "02", "10"], False),
    ],
)
def test_where_another_order_is_usual_it_is_said(tmp_path, capsys, names, differs):
    folders(tmp_path / "val", *names)
    assert numbers(tmp_path, classes=len(names)) == {name: index for index, name in enumerate(names)}
    assert ("torchvision" in capsys.readouterr().err) == differs


@pytest.mark.parametrize(
    ("train", "val", "classes", "expected"),
    [
        ("abc", "bc", 3, {"b": 1, "c": 2}),
        ("abc", "bc", None, {"b": 1, "c": 2}),
        ("bc", "abc", 3, {"a": 0, "b": 1, "c": 2}),  # those of the head
        ("bc", "abc", None, "a is not among"),  # no neighbour could answer it
        ("abx", "abc", 3, "c is not among .* and x is there"),
        ("abc", "bc", 2, "a is there to train on only"),
        ("abc", "abc", 10, "has 3 class folders.* 10 classes.*--class-map.*--num-classes"),
    ],
)
def test_both_splits_share_their_numbers(tmp_path, train, val, classes, expected):
    folders(tmp_path / "train", *train)
    folders(tmp_path / "val", *val)
    if isinstance(expected, dict):
        assert numbers(tmp_path, classes=classes) == expected
    else:
        with pytest.raises(StrataViTError, match=expected):
            numbers(tmp_path, classes=classes)


# ---- where names are kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (["a", "b", "c"], ["a", "b", "c"]),
        ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
        ({0: "a", 1: "b", 3: "c"}, None),
        (["a", "b"], None),  # of another head
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        ([1, 2, 3], None),
    ],
)
def test_names_of_a_timm_model(given, expected):
    model = timm.create_model("test_vit", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": given}
    assert class_names_of(model) == expected


@pytest.mark.parametrize(
    ("found", "known", "expected"),
    [
        (["a", "b"], None, ["a", "b"]),
        (["n01440764", "n01443537"], None, ["n01440764, tench, Tinca tinca", "n01443537, goldfish, Carassius auratus"]),
        (["n01440764", "n00000000"], None, ["n01440764, tench, Tinca tinca", "n00000000"]),
        (["n01440764", "b"], None, ["n01440764", "b"]),
        (["n1", "white shark"], ["dog", "shark, White Shark"], ["n1, dog", "shark, White Shark"]),
    ],
)
def test_a_class_keeps_the_name_of_its_folder_and_what_it_is_called(tmp_path, found, known, expected):
    names = full_names(found, known)
    assert names == expected
    assert full_names(found, names) == names  # said once, however often
    folders(tmp_path / "val", *found)
    assert numbers(tmp_path, classes=2, class_names=names) == {found[0]: 0, found[1]: 1}


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "ViTForImageClassification"])
def test_names_stay_with_a_model_until_a_new_head_has_those_of_its_folders(tmp_path, kind):
    model = make(kind)
    names = [f"kind {number}" for number in range(7)][::-1]
    assert class_names_of(model) is None
    if hasattr(model, "config"):
        model.config.id2label = dict(enumerate(names))
    else:
        model.pretrained_cfg = {**(model.pretrained_cfg or {}), "label_names": names}
    net = SuperNet(model)
    net.save(tmp_path / "run")
    small = net.extract(spec={})
    stratavit.save(small, tmp_path / "small")
    again = [SuperNet.load(tmp_path / "run"), stratavit.load(tmp_path / "small")]
    if hasattr(model, "config"):
        small.save_pretrained(tmp_path / "theirs")
        again.append(stratavit.load_transformers(tmp_path / "theirs"))
    for found in (model, net, small, *again):
        assert class_names_of(found) == names
    model = stratavit.as_timm(model)
    for others in (names[::-1], ["a", "b", "c"]):  # the old ones would number as many folders in another way
        new_head(model, others, 0)
        stratavit.save(model, tmp_path / "other", overwrite=True)
        assert class_names_of(model) == class_names_of(stratavit.load(tmp_path / "other")) == others


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A small model and a super-network with names, and a data set whose folders have them in another order."""
    work, model = tmp_path_factory.mktemp("named"), make("vit_tiny_patch16_224")
    names = [f"kind {number}" for number in range(model.num_classes)][::-1]
    model.pretrained_cfg = {**(model.pretrained_cfg or {}), "label_names": names}
    stratavit.save(model, work / "small")
    images = [torch.randn(4, 3, 32, 32)]
    SuperNet(model).contract(images).stratify(images).save(work / "run")
    folders(work / "data" / "train", *names[:5])
    folders(work / "data" / "val", *names[:3])
    return work


@pytest.mark.parametrize(
    ("command", "source", "options"),
    [
        ("evaluate", "small", []),
        ("convert", "small", ["--out", "OUT"]),
        ("finetune", "small", ["--out", "OUT", "--epochs", "1", "--repeats", "1", "--tracker", "none"]),
        ("extract", "run", ["--out", "OUT", "--max-drop", "100"]),
    ],
)
def test_every_command_asks_the_model_for_its_names(named, tmp_path, capsys, command, source, options):
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    options += ["--data", str(named / "data"), "--workers", "0", "--device", "cpu", "--batch-size", "4"]
    assert main([command, str(named / source), *options]) == 0
    assert "numbered by the model's class names" in capsys.readouterr().err


def test_neighbours_are_not_sought_among_the_images_themselves(named, capsys):
    options = ["--data", str(named / "data" / "val"), "--knn", "1", "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", str(named / "small"), *options]) == 2
    assert "find themselves" in capsys.readouterr().err
