"""Augmentation on the device: whole pixels in, every image its own crop, decided by seed and step alone."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_batches
from PIL import Image
from training_runs import ONE, TINY, Images, argv, assert_same, fresh, interrupted, make_work, outcome

from stratavit import StrataViTError, train_piad
from stratavit.cli.parser import main
from stratavit.training.augmentation import training_transform
from stratavit.training.device_augmentation import DeviceAugmentation
from stratavit.training.order import seed_all
from stratavit.training.recipe import Recipe

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
ON_DEVICE = {"augment_on": "device", "randaugment": "", "erasing": 0.0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reset_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Pixels(Images):
    """The same images as whole pixels, larger than the model's."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        larger = torch.nn.functional.interpolate(image[None], 40)[0]
        return (larger * 50 + 128).clamp(0, 255).to(torch.uint8), label


def augmented(pixels, step=0, **keys):
    seed_all(0, "step", step)
    return DeviceAugmentation(CONFIG, Recipe(**ON_DEVICE | keys), CPU)((pixels,))[0]


def test_images_are_normalised_whatever_is_cropped():
    pixels = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 40, 48)
    expected = torch.tensor([(0.2 - 0.5) / 0.2, (0.4 - 0.4) / 0.3, (0.6 - 0.3) / 0.4]).view(1, 3, 1, 1)
    torch.testing.assert_close(augmented(pixels), expected.expand(2, 3, 32, 32), atol=1e-5, rtol=0)


def test_every_image_has_its_own_crop_which_the_step_decides():
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8).expand(4, 3, 40, 40)
    found = augmented(pixels, 1)
    assert torch.equal(found, augmented(pixels, 1))
    assert not torch.allclose(found, augmented(pixels, 2), atol=0.1)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_flips_and_the_least_crop():
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(64, 3, 64, 64)
    for flip, sign in ((0.0, 1), (1.0, -1)):
        found = augmented(ramp, flip=flip, crop=0.25)
        rise = sign * (found[..., -3] - found[..., 3]).mean(dim=(1, 2))
        assert (rise > 0).all()
        assert rise.max() / rise.min() < 3  # a quarter of the area at least, sides of 3/4 to 4/3
    assert (augmented(ramp, erasing=0.9) - augmented(ramp)).abs().amax(dim=(1, 2, 3)).gt(0.5).float().mean() > 0.5


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 40, 40), torch.zeros(2, 3, 31, 40, dtype=torch.uint8), torch.zeros(2, 1, 40, 40), {}]
)
def test_other_images_are_refused(images):
    with pytest.raises(StrataViTError, match="augment_on 'device' needs whole pixels"):
        DeviceAugmentation(CONFIG, Recipe(**ON_DEVICE), CPU)((images, torch.zeros(2)))


def test_what_cannot_be_done_on_the_device_is_refused():
    with pytest.raises(StrataViTError, match="randaugment"):
        Recipe(augment_on="device")
    with pytest.raises(StrataViTError, match="proxy"):
        train_piad(fresh(), Pixels(), config=dataclasses.replace(ONE, **ON_DEVICE), cpu=True)


def test_workers_only_decode():
    transform = training_transform(CONFIG | {"crop_pct": 0.8}, Recipe(**ON_DEVICE))
    found = transform(Image.new("RGB", (70, 60), (10, 20, 30)))
    assert torch.equal(found, torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40))


def test_a_run_stopped_and_resumed(tmp_path):
    recipe = dataclasses.replace(TINY, **ON_DEVICE | {"erasing": 0.5})

    def train(data, resume, out="run"):
        where, options = tmp_path / out, {"proxy": make_batches(), "resume": resume, "cpu": True}
        return train_piad(fresh(), data, make_batches(), recipe, where, **options)

    train(Pixels(), False, "uncut")
    interrupted_by(train)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "uncut"))


def interrupted_by(train):
    """See `interrupted`, with whole pixels."""
    return interrupted(lambda data, resume: train(Pixels(data.at, data.happens), resume))


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_the_commands(tmp_path, command):
    work = make_work(tmp_path)
    options = ["--augment-on", "device", "--epochs", "1", "--growths", "1"][: 4 if command == "finetune" else 6]
    assert main([*argv(work, command, tmp_path / "out"), *options]) in (0, None)
    assert (tmp_path / "out" / "log.jsonl").exists()
