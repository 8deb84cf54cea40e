"""Augmentation and regularisation of the DeiT recipe, by timm: transforms, mixup, drop-path."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import Dataset

from stratavit.calibration.objectives import relative_errors
from stratavit.data.image_folder import ImageFolder
from stratavit.errors import StrataViTError
from stratavit.models.families import family_of
from stratavit.training.decoding import decoding_transform
from stratavit.training.recipe import Recipe
from stratavit.utils.devices import memberships

TRIES = 100


def training_transform(data_config: Mapping[str, Any], recipe: Recipe) -> Any:
    """timm's training transform: random crop and flip, RandAugment, random erasing; or what the device leaves of it."""
    if recipe.augment_on == "device":
        return decoding_transform(data_config)
    keys = ("input_size", "interpolation", "mean", "std")
    transform = create_transform(
        **{key: data_config[key] for key in keys if key in data_config},
        is_training=True,
        scale=(recipe.crop, 1.0),
        hflip=recipe.flip,
        color_jitter=0.0,
        auto_augment=recipe.randaugment or None,
        re_prob=recipe.erasing,
        re_mode="pixel",
    )
    for step in getattr(transform, "transforms", ()):
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]
        for operation in (operation for policy in policies for operation in policy):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **options: Any) -> Any:
    """timm's, with 1 bit where it draws 0, which Pillow refuses from release 13 on."""
    return posterize(image, max(1, bits), **options)


class TrainingFolder(Dataset[tuple[Tensor, int]]):
    """Images of a folder, whose transform is replaced; an unreadable one is reported and replaced by the next."""

    def __init__(self, folder: ImageFolder, transform: Any) -> None:
        folder.transform = transform
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for offset in range(min(TRIES, len(self.folder))):
            image, label, path = self.folder[(index + offset) % len(self.folder)]
            if image is not None:
                return image, label
            print(f"train: {path} is unreadable; the next image takes its place", file=sys.stderr)
        raise StrataViTError(f"train: {TRIES} images in a row are unreadable, last {path}; check the data folder")


class Features:
    """Trains a model that returns features by those of the teacher; nothing is mixed, labels are not used."""

    labelled, dropout = False, True

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return images, labels

    def taught(self, target: Tensor, output: Tensor, share: float) -> Tensor:
        """The teacher's features ``[B, D]``, whatever the share."""
        return output

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Mean of the squared distance over the squared length of the target, in float32."""
        return relative_errors(features, target).mean()


class Target:
    """Mixes images by mixup and cutmix and computes the loss against what they became, for a head of some classes.

    Attributes:
        labelled: Every image needs a label.
        dropout: The network trains with its dropout and drop-path, if it has any.
    """

    labelled, dropout = True, True

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.smoothing, self.classes = recipe.smoothing, classes
        mixes = recipe.mixup or recipe.cutmix
        options = {"label_smoothing": recipe.smoothing, "num_classes": classes}
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, **options) if mixes else None

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` and labels ``[B]`` to images and soft targets ``[B, classes]``, or unchanged."""
        if self.mixup is None:
            return images, labels
        mixed, soft = self.mixup(images, labels)
        return mixed, soft

    def taught(self, target: Tensor, output: Tensor, share: float) -> Tensor:
        """The target of a taught network: `share` of it the teacher's output, logits ``[B, classes]``."""
        if self.mixup is None:
            target = memberships(target, self.classes) * (1 - self.smoothing) + self.smoothing / self.classes
        return (1 - share) * target + share * output.float().softmax(dim=-1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy against soft targets (smoothed already) or labels, in float32."""
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


@contextmanager
def drop_path(model: nn.Module, rate: float) -> Iterator[None]:
    """Runs the body with drop-path rates rising linearly over the blocks to `rate`; puts the model's own back."""
    blocks = [block for _, block in family_of(model).blocks(model)]
    own = [(block, name, getattr(block, name)) for block in blocks for name in ("drop_path1", "drop_path2")]
    rates = torch.linspace(0, rate, len(blocks)).repeat_interleave(2).tolist()
    try:
        for (block, name, _), share in zip(own, rates, strict=True):
            setattr(block, name, DropPath(share) if share else nn.Identity())
        yield
    finally:
        for block, name, module in own:
            setattr(block, name, module.train(block.training))
