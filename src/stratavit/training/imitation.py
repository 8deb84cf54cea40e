"""Training without labels: images changed on the device, and a loss against what a teacher makes of the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from stratavit.calibration.objectives import distance
from stratavit.training.augmentation import Features, Target
from stratavit.training.recipe import Recipe
from stratavit.training.tracing import Trace, block_error, token_error
from stratavit.utils.devices import to_device

JITTER = 0.4  # brightness, contrast and saturation are changed by at most this share
RATIO = 4 / 3  # most that a crop is wider than high, or higher than wide
GREY = (0.299, 0.587, 0.114)


def random_crops(images: Tensor, crop: float, flip: float, size: tuple[int, ...], mode: str = "bilinear") -> Tensor:
    """A random part of every image ``[B, C, h, w]`` at a size, ``[B, C, H, W]``, mirrored at random.

    Args:
        images: On any device; what is random comes from the CPU's generator.
        crop: Smallest share of an image that is kept.
        flip: Probability of a mirror image.
        size: H and W.
        mode: Of interpolation.
    """
    count = len(images)
    area, stretch = torch.empty(count).uniform_(crop, 1), torch.empty(count).uniform_(-1, 1)
    sides = torch.stack([area.sqrt() * RATIO ** (stretch / 2), area.sqrt() * RATIO ** (-stretch / 2)]).clamp(max=1)
    places = (1 - sides) * torch.empty(2, count).uniform_(-1, 1)  # of the middle, from -1 to 1
    mirror = 1 - 2 * (torch.rand(count) < flip).float()
    none = torch.zeros(count)
    rows = [torch.stack([sides[0] * mirror, none, places[0]]), torch.stack([none, sides[1], places[1]])]
    turned = to_device(torch.stack(rows).permute(2, 0, 1), images.device)  # [B, 2, 3]
    grid = F.affine_grid(turned, [*images.shape[:2], *size], False)
    return F.grid_sample(images, grid, mode, padding_mode="reflection", align_corners=False)


class Changes:
    """Random crops, flips and colours of a batch, every image its own; on the device that the images are on.

    Args:
        data_config: Normalisation of the images.
        recipe: Smallest share of an image that a crop keeps, and how often one is flipped.
    """

    def __init__(self, data_config: Mapping[str, Any], recipe: Recipe) -> None:
        self.crop, self.flip = recipe.crop, recipe.flip
        self.mean, self.std = (torch.tensor(data_config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        channels = self.mean.shape[1]
        self.grey = torch.tensor(GREY if channels == 3 else (1 / channels,) * channels).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to such images in float32."""
        return self.coloured(self.cropped(images.float()))

    def cropped(self, images: Tensor) -> Tensor:
        """A random part of every image at the size of the whole, mirrored at random."""
        return random_crops(images, self.crop, self.flip, tuple(images.shape[2:]))

    def coloured(self, images: Tensor) -> Tensor:
        """Brightness, contrast and saturation of every image changed at random."""
        self.mean, self.std, self.grey = (t.to(images.device) for t in (self.mean, self.std, self.grey))
        mean, std = self.mean, self.std
        factors = torch.empty(3, len(images), 1, 1, 1).uniform_(1 - JITTER, 1 + JITTER)
        brightness, contrast, saturation = to_device(factors, images.device)
        pixels = (images * std + mean) * brightness
        grey = self._grey(pixels)
        pixels = grey.mean(dim=(2, 3), keepdim=True) * (1 - contrast) + pixels * contrast
        pixels = self._grey(pixels) * (1 - saturation) + pixels * saturation
        return (pixels - mean) / std

    def _grey(self, pixels: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, 1, H, W]``."""
        return (pixels * self.grey).sum(dim=1, keepdim=True)


class Imitation:
    """Mixes images and measures how far outputs are from a teacher's; labels are not used.

    Args:
        data_config: See `Changes`.
        recipe: Of the augmentation.
        classes: Of the head; 0 where the outputs are features.
    """

    labelled, dropout = False, False

    def __init__(self, data_config: Mapping[str, Any], recipe: Recipe, classes: int) -> None:
        self.changes, self.classes = Changes(data_config, recipe), classes
        self.mixup = Mixup(recipe.mixup, recipe.cutmix) if recipe.mixup or recipe.cutmix else None

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]``, changed and mixed, and the labels as they are."""
        images = self.changes(images)
        return (images if self.mixup is None else self.mixup(images, labels)[0]), labels

    def taught(self, target: Tensor, output: Tensor, share: float) -> Tensor:
        """The teacher's output, whatever the share."""
        return output

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Divergence (KL) from the teacher's logits ``[B, classes]``, or relative squared error of features."""
        return distance(outputs, target, self.classes) / len(outputs)


class Following:
    """The loss of another target plus the error of what happens on the way: a network returns a `tracing.Trace`.

    Args:
        inner: The target for outputs: `Imitation`, `augmentation.Target` or `augmentation.Features`.
        blocks: Weight of `tracing.block_error`.
        tokens: Weight of the relative squared error of the final tokens.
    """

    def __init__(self, inner: Any, blocks: float, tokens: float = 0.0) -> None:
        self.inner, self.blocks, self.tokens = inner, blocks, tokens
        self.labelled, self.dropout = inner.labelled, inner.dropout

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See the target for outputs."""
        mixed: tuple[Tensor, Tensor] = self.inner.mix(images, labels)
        return mixed

    def taught(self, target: Tensor, output: Trace, share: float) -> tuple[Tensor, Trace]:
        """What outputs should be, and the teacher's trace."""
        return self.inner.taught(target, output.outputs, share), output

    def loss(self, ours: Trace, target: Tensor | tuple[Tensor, Trace]) -> Tensor:
        """The sum; of a network that is not taught that of its outputs alone."""
        if isinstance(target, Tensor):
            alone: Tensor = self.inner.loss(ours.outputs, target)
            return alone
        wanted, theirs = target
        loss: Tensor = self.inner.loss(ours.outputs, wanted)
        if self.blocks:
            loss = loss + self.blocks * block_error(ours, theirs)
        if self.tokens:
            loss = loss + self.tokens * token_error(ours.tokens, theirs.tokens)
        return loss


def target_of(recipe: Recipe, classes: int) -> Any:
    """What a network learns by: labels, or where it has no classes the features of a teacher; and blocks, if asked."""
    found = Target(recipe, classes) if classes else Features()
    return Following(found, recipe.distil_blocks) if recipe.distil_blocks else found
