"""Names of classes from a class map that is given once, to the last file; and images by name."""

import json
from contextlib import redirect_stdout
from io import StringIO

import onnxruntime
import pytest
import timm
import torch
from command_line import MODEL, output, refusal, small_models
from helpers import enliven
from PIL import Image
from safetensors.torch import save_file

import stratavit
from stratavit.cli.parser import main

NAMES = ["zebra", "ant", "mule"]  # in another order than that of folders
PLAIN = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Weights, images in the class folders that these weights say, and what `convert` made of both and a class map."""
    folder = tmp_path_factory.mktemp("names")
    generator = torch.Generator().manual_seed(0)
    (folder / "all").mkdir()
    for number in range(60):
        pixels = torch.randint(0, 256, (3,), generator=generator).tolist()
        Image.new("RGB", (32, 32), tuple(pixels)).save(folder / "all" / f"{number}.png")
    (folder / "map.txt").write_text("\n".join(NAMES))
    (folder / "wrong.txt").write_text("\n".join(NAMES[::-1]))
    with small_models():
        save_file(enliven(timm.create_model(MODEL, num_classes=3)).state_dict(), folder / f"{MODEL}.safetensors")
        found = predicted(
            folder, MODEL, folder / "all", *weights(folder), "--top", "1", "--class-map", folder / "map.txt"
        )
        for number, row in enumerate(found):
            place = folder / "data" / ("val" if number % 2 else "train") / row["classes"][0]["name"]
            place.mkdir(parents=True, exist_ok=True)
            (folder / "all" / row["image"].rpartition("/")[2]).rename(place / f"{number}.png")
        assert main(convert(folder, "run", "map.txt")) == 0
        assert main(["extract", str(folder / "run"), "--macs", "0.9", "--out", str(folder / "small")]) == 0
        yield folder


def weights(folder):
    return ["--weights", folder / f"{MODEL}.safetensors", "--num-classes", "3"]


def convert(folder, out, class_map):
    options = ["--data", folder / "data", "--class-map", folder / class_map, "--out", folder / out, *weights(folder)]
    return [str(part) for part in ("convert", MODEL, *options, *PLAIN)]


def predicted(folder, *arguments):
    with redirect_stdout(StringIO()) as printed:
        assert main([*map(str, ("predict", *arguments)), "--json", "--device", "cpu"]) == 0
    return json.loads(printed.getvalue())["images"]


def names_in(file):
    return json.loads(file.read_text(encoding="utf-8"))["label_names"]


def test_every_file_names_the_classes(work, tmp_path):
    assert names_in(work / "run/stratavit.json") == names_in(work / "run/config.json") == NAMES
    assert names_in(work / "small/stratavit.json") == NAMES
    timms = timm.create_model(f"local-dir:{work / 'run'}", pretrained=True)
    assert timms.pretrained_cfg["label_names"] == NAMES
    for form, file in (("onnx", "m.onnx"), ("torch", "m.pt2")):
        assert main(["export", str(work / "small"), "--format", form, "--out", str(tmp_path / file)]) == 0
    said = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_modelmeta().custom_metadata_map
    there = {"stratavit.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=there)
    small = json.loads((work / "small/stratavit.json").read_text())
    for facts in ({key: json.loads(value) for key, value in said.items()}, json.loads(there["stratavit.json"])):
        assert facts == {key: small[key] for key in ("label_names", "data_config")}


def test_the_class_map_is_asked_for_once(work, capsys):
    for arguments in (("evaluate", work / "run"), ("evaluate", work / "small"), ("export", work / "small")):
        more = ["--out", work / "x.pt2", "--format", "torch"] if arguments[0] == "export" else []
        main([*map(str, (*arguments, *more, "--data", work / "data", "--workers", "0"))])
        assert "by the model's class names" in capsys.readouterr().err
    assert output(capsys, "evaluate", work / "run", "--data", work / "data", *PLAIN)["top1"] == 100
    assert output(capsys, "info", work / "small")["label_names"] == NAMES


def test_convert_says_how_good_the_dense_model_is(work, capsys):
    facts = stratavit.SuperNet.load(work / "run").provenance
    assert (facts["dense"]["top1"], facts["dense"]["doubt"]) == (100, None)
    assert facts["source"]["base_model"] == f"timm/{MODEL}.fb_in1k"
    got = output(capsys, *convert(work, "doubtful", "wrong.txt"))
    assert got["dense"]["top1"] < 50
    assert got["dense"]["doubt"]
    assert not got["classes_named"]  # by names that the images speak against
    assert "label_names" not in json.loads((work / "doubtful/stratavit.json").read_text())


def test_an_accuracy_near_chance_is_told(work, capsys):
    for class_map, told in (("map.txt", False), ("wrong.txt", True)):
        arguments = ["evaluate", work / "run", "--data", work / "data", "--class-map", work / class_map, *PLAIN]
        assert main([*map(str, arguments)]) == 0
        assert ("near chance" in capsys.readouterr().err) == told


def test_images_in_both_splits_are_told(work, tmp_path, capsys):
    image = next((work / "data/train/ant").iterdir())
    copied = work / "data/val/mule/copy.png"
    copied.write_bytes(image.read_bytes())
    try:
        main([*convert(work, "again", "map.txt"), "--images", "500"])
        assert "1 of " in (said := capsys.readouterr().err)
        assert "copy.png" in said
    finally:
        copied.unlink()


def test_images_by_name(work, capsys):
    images = sorted((work / "data/val/ant").iterdir())
    for target in ("run", "small"):
        found = predicted(work, work / target, images[0], work / "data/val/ant")
        assert len(found) == 1 + len(images)
        assert found[0]["image"] == str(images[0])
        for row in found:
            shares = [one["probability"] for one in row["classes"]]
            assert sum(shares) == pytest.approx(1)
            assert shares == sorted(shares, reverse=True)
            assert all(one["name"] == NAMES[one["class"]] for one in row["classes"])
    assert {row["classes"][0]["name"] for row in predicted(work, work / "run", work / "data/val/ant")} == {"ant"}
    assert main(["predict", str(work / "run"), str(images[0]), "--macs", "0.9", "--top", "2"]) == 0
    assert "ant" in capsys.readouterr().out


def test_what_predict_refuses(work, tmp_path, capsys):
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n")
    image = next((work / "data/val/ant").iterdir())
    for words, *arguments in (
        ("no.png", tmp_path / "no.png"),
        ("absent", tmp_path / "absent"),
        ("no images", tmp_path / "empty"),
        ("2 classes", image, "--class-map", tmp_path / "two.txt"),
    ):
        assert words in refusal(capsys, "predict", work / "small", *arguments)
    assert "one size" in refusal(capsys, "predict", work / "small", image, "--macs", "0.9")


@pytest.mark.parametrize("command", ["evaluate", "curve"])
def test_a_quick_look(work, tmp_path, capsys, command):
    more = ["--out", tmp_path / "curve", "--shares", "1"] if command == "curve" else []
    got = output(capsys, command, work / "run", "--data", work / "data", "--limit", "7", *PLAIN, *more)
    assert (got["points"][0] if command == "curve" else got)["n"] == 7
