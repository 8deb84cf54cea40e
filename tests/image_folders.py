"""Folders of random images, one per class, that several test modules share."""

from pathlib import Path

import torch
from helpers import CLASSES
from PIL import Image


def write_images(folder: Path, splits: tuple[str, ...] = ("train", "val"), side: int = 40) -> Path:
    """One image of every class in every split; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for name in range(CLASSES):
            (folder / split / str(name)).mkdir(parents=True)
            pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / str(name) / "0.png")
    return folder
