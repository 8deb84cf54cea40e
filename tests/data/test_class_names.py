"""Which class a folder is: by a class map, by the model's names, by the training split, by order."""

import unicodedata

import pytest
import timm
import torch
from architectures import make
from PIL import Image

import stratavit
from stratavit import StrataViTError, SuperNet, class_names_of, image_loader
from stratavit.cli.parser import main
from stratavit.cli.train import new_head

CONFIG = {"input_size": (3, 8, 8)}


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return root


def numbers(root, split="val", classes=None, **options):
    """Class folder -> the label that its images get."""
    loader = image_loader(root, CONFIG, split, classes, **options)
    return {path.split("/")[-2]: label for path, label in loader.dataset.samples}


# ---- names of the model ----------------------------------------------------------------------------------------

NAMES = ["dog", "great white shark, white shark", "Ant", "crane", "crane, machine", "0"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["dog", "Ant"], [0, 2]),
        (["DOG", "ant"], [0, 2]),
        (["white shark"], [1]),
        (["great_white_shark", "dog"], [1, 0]),
        (["Great White Shark, white shark"], [1]),
        (["machine"], [4]),
        (["crane"], [3]),  # the whole name of one, a part of the other's
        (["0", "dog"], [5, 0]),
        (["dog", ".cache"], [0, None]),
    ],
)
def test_folders_called_as_the_model_calls_its_classes(tmp_path, found, expected):
    labels = numbers(folders(tmp_path / "val", *found).parent, classes=6, class_names=NAMES)
    assert [labels.get(name) for name in found] == expected


@pytest.mark.parametrize(
    ("found", "names", "odd"),
    [
        (["dog", "tmp"], NAMES, "tmp"),
        (["dog", "cat", "cow"], NAMES, "cow"),
        (["b"], ["b", "b", "c"], "2 classes of that name"),
        (["B"], ["b", "b ", "c"], "2 classes of that name"),
        (["y"], ["x, y", "y, z"], "2 classes of that name"),
        (["white shark", "great white shark"], NAMES, "both called"),
        (["dog", "Dog"], NAMES, "both called"),
    ],
)
def test_folders_that_the_names_leave_open(tmp_path, found, names, odd):
    with pytest.raises(StrataViTError, match=odd):
        numbers(folders(tmp_path / "val", *found).parent, classes=len(names), class_names=names)


def test_names_that_fit_no_folder_leave_the_order_and_it_is_said(tmp_path, capsys):
    folders(tmp_path / "val", "n02", "n10", "n1")
    assert numbers(tmp_path, classes=3, class_names=["a", "b", "c"]) == {"n1": 0, "n02": 1, "n10": 2}
    assert "none of which the model names" in capsys.readouterr().err


def test_a_class_map_wins(tmp_path):
    folders(tmp_path / "val", "a", "b")
    (tmp_path / "map.txt").write_text("b\na\n")
    options = {"class_map": tmp_path / "map.txt", "class_names": ["a", "b"]}
    assert numbers(tmp_path, classes=2, **options) == {"a": 1, "b": 0}


@pytest.mark.parametrize("text", ["b\r\na\r\n", "\ufeffb\na\n", "\n b \n\na"])
def test_class_maps_of_other_editors(tmp_path, text):
    folders(tmp_path / "val", "a", "b")
    (tmp_path / "map.txt").write_bytes(text.encode())
    assert numbers(tmp_path, classes=2, class_map=tmp_path / "map.txt") == {"a": 1, "b": 0}


@pytest.mark.parametrize("form", ["NFC", "NFD"])  # letters and their accents in one, and apart as macOS writes them
def test_names_that_look_alike_are_alike(tmp_path, form):
    ours, others = (unicodedata.normalize(way, "\u00c4ffchen") for way in (form, "NFC" if form == "NFD" else "NFD"))
    folders(tmp_path / "val", "Zebra", ours)
    (tmp_path / "map.txt").write_text(f"{others}\nZebra\n", encoding="utf-8")
    for options in ({"class_names": [others, "Zebra"]}, {"class_map": tmp_path / "map.txt"}):
        assert numbers(tmp_path, classes=2, **options) == {ours: 0, "Zebra": 1}


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["1", "2", "10"], True),
        (["class9", "class10"], True),
        (["a", "B"], True),  # letters in any case alike, as timm has them
        (["01", "02", "10"], False),
        (["n01440764", "n01443537"], False),
    ],
)
def test_where_another_order_is_usual_it_is_told(tmp_path, capsys, names, told):
    folders(tmp_path / "val", *names)
    assert numbers(tmp_path, classes=len(names)) == {name: index for index, name in enumerate(names)}
    assert ("torchvision" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("train", "val", "classes", "expected"),
    [
        ("abc", "abc", 3, {"a": 0, "b": 1, "c": 2}),
        ("abc", "bc", 3, {"b": 1, "c": 2}),
        ("abc", "bc", None, {"b": 1, "c": 2}),
        ("bc", "abc", 3, {"a": 0, "b": 1, "c": 2}),  # those of the head
        ("bc", "abc", None, "a is not among"),  # no neighbour could answer it
        ("abcx", "abc", 3, "x is there to train on only"),
        ("abx", "abc", 3, "c is not among .* and x is there"),
        ("abc", "bcx", 3, "x is not among"),
        ("abc", "bc", 2, "a is there to train on only"),
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


def test_neighbours_are_not_sought_among_the_images_themselves(tmp_path, capsys):
    stratavit.save(make("vit_tiny_patch16_224"), tmp_path / "small")
    folders(tmp_path / "data", "a", "b")
    options = ["--data", str(tmp_path / "data"), "--knn", "1", "--workers", "0", "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "small"), *options]) == 2
    assert "find themselves" in capsys.readouterr().err


# ---- where names are kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (["a", "b", "c"], ["a", "b", "c"]),
        (("a", "b", "c"), ["a", "b", "c"]),
        ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
        ({0: "a", 1: "b", 3: "c"}, None),
        (["a", "b"], None),  # of another head
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        ([1, 2, 3], None),
        ({"x": "a"}, None),
    ],
)
def test_names_of_a_timm_model(given, expected):
    model = timm.create_model("test_vit", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": given}
    assert class_names_of(model) == expected
    assert class_names_of(SuperNet(model)) == expected


def test_names_of_a_model_of_transformers_stay_with_it(tmp_path):
    model = make("ViTForImageClassification")
    names = [f"kind {number}" for number in range(model.config.num_labels)][::-1]
    assert class_names_of(model) is None
    model.config.id2label = dict(enumerate(names))
    net = SuperNet(model)
    net.save(tmp_path / "run")
    small = net.extract(spec={})
    stratavit.save(small, tmp_path / "small")
    small.save_pretrained(tmp_path / "theirs")
    again = [SuperNet.load(tmp_path / "run"), stratavit.load(tmp_path / "small")]
    again.append(stratavit.load_transformers(tmp_path / "theirs"))
    for found in (model, net, small, *again):
        assert class_names_of(found) == names


def test_names_of_a_timm_model_stay_with_it(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["z", "y", "x"]}
    net = SuperNet(model)
    net.save(tmp_path / "run")
    net = SuperNet.load(tmp_path / "run")
    stratavit.save(net.extract(spec={}), tmp_path / "small")
    assert class_names_of(net) == class_names_of(stratavit.load(tmp_path / "small")) == ["z", "y", "x"]


@pytest.mark.parametrize("names", ["abcdefg", "abc"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViTForImageClassification"])
def test_a_new_head_has_the_names_of_its_folders(tmp_path, name, names):
    """The old ones would number the same folders otherwise, where there are as many."""
    model = make(name)
    if hasattr(model, "config"):
        model.config.id2label = dict(enumerate("gabcdef"))
    model = stratavit.as_timm(model)
    new_head(model, list(names), 0)
    assert class_names_of(model) == list(names)
    stratavit.save(model, tmp_path / "small")
    assert class_names_of(stratavit.load(tmp_path / "small")) == list(names)


@pytest.mark.parametrize("command", ["evaluate", "convert", "finetune", "extract"])
def test_every_command_asks_the_model_for_its_names(tmp_path, capsys, command):
    """The order of the folders would give a the number of b."""
    model = make("vit_tiny_patch16_224")
    names = [f"kind {number}" for number in range(model.num_classes)][::-1]
    model.pretrained_cfg = {**(model.pretrained_cfg or {}), "label_names": names}
    if command == "extract":
        SuperNet(model).contract([torch.randn(4, 3, 32, 32)]).stratify([torch.randn(4, 3, 32, 32)]).save(
            tmp_path / "in"
        )
    else:
        stratavit.save(model, tmp_path / "in")
    folders(tmp_path / "data" / "train", *names[:5])
    folders(tmp_path / "data" / "val", *names[:3])
    options = ["--data", str(tmp_path / "data"), "--workers", "0", "--device", "cpu", "--batch-size", "4"]
    if command != "evaluate":
        options += ["--out", str(tmp_path / "out")]
    options += {
        "finetune": ["--epochs", "1", "--repeats", "1", "--tracker", "none"],
        "extract": ["--max-drop", "100"],
    }.get(command, [])
    assert main([command, str(tmp_path / "in"), *options]) == 0
    assert "numbered by the model's class names" in capsys.readouterr().err


def test_names_from_a_file_are_checked(tmp_path):
    model = timm.create_model("test_vit", num_classes=2)
    stratavit.save(model, tmp_path / "small")
    content = stratavit.files.folders.read_json(tmp_path / "small" / "stratavit.json")
    content.pop("hashes")
    for names in ("ab", [1, 2], {"0": "a"}):
        stratavit.files.folders.write_json(tmp_path / "small" / "stratavit.json", content | {"label_names": names})
        with pytest.raises(stratavit.ArtifactError, match="label_names"):
            stratavit.load(tmp_path / "small")
