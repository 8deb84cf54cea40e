"""Images from folders: prepared as the model was trained, in order, without those that are damaged."""

import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from stratavit import Recipe, StrataViTError, SuperNet, evaluate
from stratavit.data.image_folder import image_loader
from stratavit.training.augmentation import training_transform

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 1.0),
    "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with classes n1, n2 and n10, a shade for each class; 2 images of each in val."""
    for shade, name in enumerate(("n1", "n2", "n10")):
        for path, value in (
            (f"train/{name}/0", 100 + shade),
            (f"val/{name}/0", 10 * shade),
            (f"val/{name}/1", 10 * shade),
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), (value,) * 3).save(tmp_path / f"{path}.png")
    return tmp_path


def load(folder, split="val", num_classes=3, config=CONFIG, **options):
    return image_loader(folder, config, split, num_classes, **options)


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def shades(images):
    """Grey level of each (plain) image, from its last channel, which CONFIG does not shift."""
    return (images[:, 2].mean(dim=(1, 2)) * 255).round().int().tolist()


def test_images_and_labels_in_natural_order_of_the_classes(folder):
    images, labels = everything(load(folder))
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert shades(images) == [0, 0, 10, 10, 20, 20]
    assert shades(everything(load(folder, "train"))[0]) == [100, 101, 102]
    for split in ("train", "val"):  # a bare folder of classes is both
        assert shades(everything(load(folder / "val", split))[0]) == [0, 0, 10, 10, 20, 20]


def test_batches_limit_and_repeated_passes(folder):
    loader = load(folder, batch_size=4)
    assert [len(labels) for _, labels in loader] == [4, 2]
    assert len(loader) == 2
    assert torch.equal(everything(loader)[0], everything(loader)[0])
    assert everything(load(folder, limit=3))[1].tolist() == [0, 1, 2]
    assert len(everything(load(folder, limit=100))[1]) == 6


def test_preparation_follows_the_data_config_as_timms_does(folder):
    path = folder / "val" / "n1" / "0.png"
    Image.new("RGB", (20, 24), (255, 0, 51)).save(path)
    image = load(folder).dataset[0][0]
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -0.5, 0.2], abs=1e-5)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8)).save(path)
    config = CONFIG | {"crop_pct": 0.8}
    expected = timm.data.create_transform(**config, is_training=False)(Image.open(path).convert("RGB"))
    assert torch.equal(load(folder, config=config).dataset[0][0], expected)


def test_a_model_of_one_channel_gets_one(folder):
    gray = CONFIG | {"input_size": (1, 16, 16), "mean": (0.0,), "std": (1.0,)}
    assert everything(load(folder, config=gray))[0].shape == (6, 1, 16, 16)
    with pytest.raises(StrataViTError, match="expects 4"):
        load(folder, config=CONFIG | {"input_size": (4, 16, 16)})


def test_an_image_of_another_form_under_a_usual_name(folder):
    path = folder / "val" / "n1" / "0.png"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path, "JPEG")
    dataset = load(folder).dataset
    with Image.open(path) as image:
        assert torch.equal(dataset[0][0], dataset.transform(image.convert("RGB")))


# ---- what cannot be read --------------------------------------------------------------------------------------


def raising(fault):
    def fail(*args):
        raise fault

    return fail


@pytest.mark.parametrize(
    ("place", "fault"),
    [("decoding", MemoryError()), ("transform", MemoryError()), ("transform", TypeError("ours"))],
)
def test_a_fault_that_is_not_the_images_is_no_damage(folder, monkeypatch, place, fault):
    """Without an image for which memory was too small the others would be another calibration set."""
    loader = load(folder)
    if place == "decoding":
        monkeypatch.setattr(Image.Image, "convert", raising(fault))
    else:
        loader.dataset.transform = raising(fault)
    words = r"0\.png .*20 x 24 pixels" if isinstance(fault, MemoryError) else r"0\.png cannot be prepared \(ours\)"
    with pytest.raises(StrataViTError, match=words):
        list(loader)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_unreadable_images_are_left_out_with_a_count(folder, capsys, batch_size):
    """Not an image, cut short, empty."""
    places = [folder / "val" / name / "0.png" for name in ("n1", "n2", "n10")]
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(places[1])
    for path, content in zip(places, (b"not an image", places[1].read_bytes()[:5000], b""), strict=True):
        path.write_bytes(content)
    loader = load(folder, batch_size=batch_size)
    images, labels = everything(loader)
    assert labels.tolist() == [0, 1, 2]
    assert shades(images) == [0, 10, 20]
    said = capsys.readouterr().err.replace("\\", "/")
    assert "left out 3 unreadable images" in said
    assert "n1/0.png" in said
    assert len(loader.unreadable) == 3
    everything(loader)
    assert capsys.readouterr().err == ""  # said once
    assert evaluate(timm.create_model("resnet10t", num_classes=3), loader).n == 3
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(StrataViTError, match="no images"):
        evaluate(timm.create_model("resnet10t", num_classes=3), load(folder))


@pytest.mark.parametrize("path", ["none", "val/n1/0.png", "empty"])
def test_missing_and_empty_folders(folder, path):
    (folder / "empty").mkdir()
    with pytest.raises(StrataViTError, match=rf"{path} .*expected [^\n]*$"):
        load(folder / path)


@pytest.mark.real_weights
def test_real_validation_images_score_as_documented(real_data, deit_tiny):
    """Every fifth image: ../shared/data.md gives 79.7 on all 433; 87 of them meet that within 3 standard errors."""
    options = {"class_map": real_data / "imagenet" / "class_map.txt", "batch_size": 32, "limit": 87}
    loader = image_loader(real_data / "imagenet", SuperNet(deit_tiny).data_config, "val", 1000, **options)
    found = evaluate(deit_tiny, loader)
    assert found.n == 87
    assert abs(found.top1 - 79.7) < 13
    assert found.top5 > 90


@pytest.mark.parametrize("augment", ["rand-m9-mstd0.5-inc1", "original", "augmix-m10"])
def test_no_bits_are_one(augment):
    """timm draws 0 bits to keep, which Pillow 13 refuses; the image would end the training."""
    steps = training_transform({"input_size": (3, 16, 16)}, Recipe(randaugment=augment)).transforms
    policies = [policy for step in steps for policy in getattr(step, "policy", None) or [getattr(step, "ops", ())]]
    operations = [operation for policy in policies for operation in policy if "Posterize" in operation.name]
    assert operations
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    for operation in operations:
        assert operation.aug_fn(image, 0).getpixel((0, 0)) == (128, 0, 0)
        assert operation.aug_fn(image, 4).getpixel((0, 0)) == (192, 96, 48)
