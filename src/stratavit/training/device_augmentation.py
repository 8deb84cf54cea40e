"""Augmentation on the training device: workers only decode images and bring them to one size, as whole pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from stratavit.errors import StrataViTError
from stratavit.training.imitation import random_crops
from stratavit.training.recipe import Recipe
from stratavit.utils.devices import to_device


class DeviceAugmentation:
    """Random crops, flips and erasing of a batch, every image its own.

    All that is random follows from torch's and Python's generators, which the trainer seeds by the step.

    Args:
        data_config: Size, normalisation and interpolation of the model's images.
        recipe: Smallest share of an image that a crop keeps; how often one is flipped, or a part of it erased.
        device: That the network is trained on.
    """

    def __init__(self, data_config: Mapping[str, Any], recipe: Recipe, device: torch.device) -> None:
        self.shape, self.device = tuple(data_config["input_size"]), device
        self.crop, self.flip = recipe.crop, recipe.flip
        self.mode = "bilinear" if data_config.get("interpolation") == "bilinear" else "bicubic"
        mean, std = (torch.tensor(data_config[key]).view(1, -1, 1, 1).to(device) for key in ("mean", "std"))
        self.mean, self.std = mean, std
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device=device) if recipe.erasing else None

    def __call__(self, batch: Any) -> tuple[Tensor, ...]:
        """A batch with its images as the model takes them, ``[B, C, H, W]`` float32 on the device.

        Args:
            batch: Images ``[B, C, S, S]`` uint8, alone or followed by labels.

        Raises:
            StrataViTError: The images are something else, or smaller than the model's.
        """
        images, *labels = batch if isinstance(batch, tuple | list) else (batch,)
        self._check(images)
        pixels = to_device(images, self.device).float() / 255
        pixels = random_crops(pixels, self.crop, self.flip, self.shape[1:], self.mode).clamp(0, 1)  # bicubic overshoots
        images = (pixels - self.mean) / self.std
        return (images if self.erase is None else self.erase(images)), *labels

    def _check(self, images: Any) -> None:
        channels, *sides = self.shape
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        sound = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.dim() == 4
        if not sound or images.shape[1] != channels or any(s < n for s, n in zip(images.shape[2:], sides, strict=True)):
            raise StrataViTError(
                f"train: augment_on 'device' needs whole pixels, uint8 [B, {channels}, H, W] of at least {sides[0]} x "
                f"{sides[1]}, got {found}; let the data set return them, or set augment_on to 'workers'"
            )
