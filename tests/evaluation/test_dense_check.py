"""Wrong classes, wrong weights and an untrained head are seen in a few images before any other work."""

import pytest
import torch
from PIL import Image
from torch import nn

from stratavit import image_loader
from stratavit.evaluation.dense_check import NORMALISATIONS, check_dense, near_chance

CLASSES = 12
NAMES = [str(number) for number in range(CLASSES)]
MEAN, STD = NORMALISATIONS["0.5 as"]
CONFIG = {"input_size": (3, 8, 8), "mean": MEAN, "std": STD}


class Brightness(nn.Module):
    """Class k are images of brightness k of CLASSES, normalised by 0.5."""

    num_classes = CLASSES

    def __init__(self, constant=False):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()) if constant else torch.ones(()))

    def forward(self, images):
        level = (images.mean((1, 2, 3)) / 2 + 0.5) * CLASSES - 0.5
        return -self.scale * (level[:, None] - torch.arange(CLASSES)) ** 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
        (folder / name).mkdir()
        for copy in range(4):
            grey = int(255 * (number + 0.4 + 0.05 * copy) / CLASSES)
            Image.new("RGB", (8, 8), (grey,) * 3).save(folder / name / f"{copy}.png")
    return folder


def check(data, tmp_path, order=None, config=CONFIG, model=None, limit=None):
    class_map = None
    if order is not None:
        class_map = tmp_path / "map.txt"
        class_map.write_text("\n".join(order))
    loader = image_loader(data, config, "train", CLASSES, class_map, batch_size=7, limit=limit)
    return check_dense(model or Brightness(), loader, config)


def test_nothing_speaks_against_a_model_that_is_right(data, tmp_path):
    found = check(data, tmp_path, limit=24)
    assert (found.top1, found.n, found.doubt, found.numbered) == (100, 24, None, True)


@pytest.mark.parametrize("order", [NAMES[::-1], sorted(NAMES)])
def test_a_class_map_in_another_order_is_found(data, tmp_path, order):
    found = check(data, tmp_path, order)
    assert found.top1 < 50
    assert "natural order" in found.doubt
    assert "100.0 %" in found.doubt
    assert not found.numbered


def test_weights_of_a_model_for_other_pixels_are_found(data, tmp_path):
    for name, (mean, std) in NORMALISATIONS.items():
        found = check(data, tmp_path, config={**CONFIG, "mean": mean, "std": std})
        assert (found.doubt is None) == (name == "0.5 as")
        assert found.numbered  # the classes are right
        assert found.doubt is None or ("with 0.5" in found.doubt and "100%" in found.doubt)


def test_a_model_near_chance_is_told(data, tmp_path):
    found = check(data, tmp_path, model=Brightness(constant=True))
    assert found.top1 == pytest.approx(100 / CLASSES)
    assert "near chance" in found.doubt
    assert not found.numbered


@pytest.mark.parametrize(
    ("share", "images", "classes", "near"),
    [(0, 256, 1000, True), (0.01, 256, 1000, False), (0.5, 100, 2, True), (0.7, 100, 2, False), (0, 2, 2, False)],
)
def test_near_chance_is_what_guessing_may_give_and_few_images_say_nothing(share, images, classes, near):
    assert near_chance(share, images, classes) == near


def test_features_have_no_accuracy(data, tmp_path):
    model = Brightness()
    loader = image_loader(data, CONFIG, "train", CLASSES)
    model.num_classes = 0
    assert check_dense(model, loader, CONFIG) is None
