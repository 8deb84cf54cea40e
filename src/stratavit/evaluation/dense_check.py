"""Whether a dense model is what its user takes it for: its accuracy on a few labelled images, before any other work.

Wrong classes or weights would go unnoticed: every later figure is relative to the dense model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from stratavit.data.image_files import in_natural_order
from stratavit.data.image_folder import ImageLoader
from stratavit.evaluation.accuracy import labelled
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.utils.model import classes_of, measured_at, model_device, model_dtype

IMAGES, COMPARED = 256, 64  # the latter for each normalisation
NORMALISATIONS = {
    "ImageNet's": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "0.5 as": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "CLIP's": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
SURE = 0.9  # share of images; a model that has so many right is taken for what it is
IMAGENET_CLASSES, TRAINED = 1000, 0.6  # its models have more right
_CHECK = (
    "are the classes in the order of the head (--class-map), are these the weights of this model (--weights), and is "
    "its head trained?"
)


@dataclass(frozen=True)
class DenseCheck:
    """The accuracy of a dense model on a few images, and what makes one doubt it.

    Attributes:
        top1: Percent.
        error: Its standard error, points.
        n: Number of images.
        doubt: What is wrong, or looks so, and what to do; None if nothing.
        numbered: Whether the numbers of the classes fit the model, as far as the images tell.
    """

    top1: float
    error: float
    n: int
    doubt: str | None = None
    numbered: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"dense top-1 {self.top1:.1f} % (standard error {self.error:.1f}) on {self.n} of these images"


def check_dense(model: nn.Module, loader: ImageLoader, config: Mapping[str, Any]) -> DenseCheck | None:
    """Measures a dense model on `IMAGES` images of a loader, spread evenly over its classes.

    There is a doubt if other numbers of the classes (in the order of their names) or another normalisation of the
    images suit the model far better, if it is near chance, or far below models for ImageNet.

    Args:
        model: From images to logits, or a `SuperNet`.
        loader: Its images and labels; not more of them than it has.
        config: How its images are prepared, timm's data configuration.

    Returns:
        What was found; None of a model that outputs features, and of images none of which can be read.

    Raises:
        StrataViTError: See `evaluate`.
    """
    classes = classes_of(model)
    if not classes:
        return None
    labels, (found,) = _predicted(model, _few(loader, IMAGES), [_as_is])
    if not len(labels):
        return None
    share, n = float((found == labels).float().mean()), len(labels)
    doubt = _other_numbers(loader.dataset.numbering.names, labels, found)
    numbered = doubt is None
    if doubt is None and share < SURE:
        doubt = _other_normalisation(model, loader, config)
    if doubt is None and near_chance(share, n, classes):
        doubt, numbered = f"that is near chance ({100 / classes:.2g} %): {_CHECK}", False
    elif doubt is None and classes == IMAGENET_CLASSES and share < TRAINED:
        doubt = f"models for ImageNet have more than {TRAINED:.0%}: {_CHECK}"
    return DenseCheck(100 * share, 100 * sqrt(share * (1 - share) / n), n, doubt, numbered)


def near_chance(share: float, images: int, classes: int) -> bool:
    """Whether a share of right images is no more than guessing may give: two standard errors above it at most."""
    limit = 1 / classes + 2 * sqrt((1 - 1 / classes) / classes / images)
    return share <= limit < 1  # else even all of them right would say nothing


def _as_is(images: Tensor) -> Tensor:
    return images


def _few(loader: ImageLoader, images: int) -> ImageLoader:
    """A loader of so many images of another's data set, or as many as that takes."""
    batch, workers = loader.loader.batch_size or 1, loader.loader.num_workers
    return ImageLoader(loader.dataset, batch, workers, min(images, len(loader.chosen)))


@torch.inference_mode()
def _predicted(
    model: nn.Module, loader: ImageLoader, changes: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Labels ``[N]`` of the images of a loader, and the classes predicted ``[N]`` after each change of the images."""
    known, found = [torch.empty(0, dtype=torch.long)], [[torch.empty(0, dtype=torch.long)] for _ in changes]
    with measured_at(model, None) as run:
        for images, labels in labelled(loader, model, "dense model"):
            known.append(labels)
            for change, predicted in zip(changes, found, strict=True):
                changed = change(images).to(model_device(model), model_dtype(model))
                predicted.append(tensor_of(run(changed)).argmax(-1).cpu())
    loader.close()
    return torch.cat(known), [torch.cat(predicted) for predicted in found]


def _far_better(other: Tensor, right: Tensor) -> bool:
    """Whether far more images are right (``[N]`` bool) another way: five points, and three standard errors, paired."""
    won, lost = int((other & ~right).sum()), int((right & ~other).sum())
    return won - lost > max(3 * sqrt(won + lost), 0.05 * len(right))


def _other_numbers(names: Sequence[str], labels: Tensor, found: Tensor) -> str | None:
    """The doubt if classes numbered in an order of their names suit the model far better."""
    for how, order in (("natural order (2 before 10)", in_natural_order(names)), ("order of letters", sorted(names))):
        place = {name: number for number, name in enumerate(order)}
        other = found == torch.tensor([place[name] for name in names])[labels]
        if _far_better(other, found == labels):
            return (
                f"with the classes in {how} of their names it is {100 * float(other.float().mean()):.1f} %: give a "
                "--class-map with one name per line in the order of the head, or leave out the one that you gave"
            )
    return None


def _other_normalisation(model: nn.Module, loader: ImageLoader, config: Mapping[str, Any]) -> str | None:
    """The doubt if images of three channels, normalised in another usual way, suit the model far better."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    if len(mean) != 3:
        return None

    def renormalised(images: Tensor, values: tuple[Any, Any]) -> Tensor:
        other_mean, other_std = (torch.tensor(value).view(3, 1, 1) for value in values)
        return (images * std + mean - other_mean) / other_std

    own = tuple(config["mean"]), tuple(config["std"])
    ways = {name: partial(renormalised, values=values) for name, values in NORMALISATIONS.items() if values != own}
    labels, (given, *others) = _predicted(model, _few(loader, COMPARED), [_as_is, *ways.values()])
    for name, other in zip(ways, others, strict=True):
        if _far_better(other == labels, given == labels):
            share = float((other == labels).float().mean())
            return (
                f"with {name} mean and standard deviation of pixels it is {share:.0%} of {len(labels)}: these are the "
                "weights of another model; convert it under the name that they were published with"
            )
    return None
