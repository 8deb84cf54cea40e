"""Small folders of images that several test modules share, and the labels that a loader gives them."""

import os
from pathlib import Path

import torch
from helpers import CLASSES
from PIL import Image

from stratavit import image_loader
from stratavit.data.image_reading import endings

CONFIG = {"input_size": (3, 8, 8)}


def write(root, *paths):
    """Images, or texts where the ending is not an image's."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if os.path.splitext(path)[1].lower() in endings():
            Image.new("RGB", (8, 8)).save(root / path)
        else:
            (root / path).write_text("something")
    return root


def labels_of(root, split="val", classes=None, **options):
    """Path in the data set -> label."""
    samples = image_loader(root, CONFIG, split, classes, **options).dataset.samples
    return {os.path.relpath(path, root).replace(os.sep, "/"): label for path, label in samples}


def write_images(folder: Path, splits: tuple[str, ...] = ("train", "val"), side: int = 40) -> Path:
    """One random image of every class in every split; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for name in range(CLASSES):
            (folder / split / str(name)).mkdir(parents=True)
            pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / str(name) / "0.png")
    return folder
