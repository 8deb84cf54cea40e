"""Classes of single images, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stratavit.data.class_names import class_names_of
from stratavit.data.image_files import Listing, in_natural_order
from stratavit.data.image_folder import ImageFolder
from stratavit.data.image_reading import endings
from stratavit.errors import StrataViTError, shown
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.utils.model import classes_of, measured_at, model_device, model_dtype


def image_paths(given: Sequence[str]) -> list[str]:
    """Files as given, and of a folder the images directly in it, in natural order.

    Raises:
        StrataViTError: There is no such file or folder, or a folder holds no images.
    """
    found: list[str] = []
    for name in given:
        path = Path(name)
        if not path.exists():
            raise StrataViTError(f"{name} is neither a file nor a folder; give image files, or folders of them")
        if not path.is_dir():
            found.append(name)
            continue
        inside = [one for one in os.listdir(path) if Path(one).suffix.lower() in endings() and not one.startswith(".")]
        if not inside:
            raise StrataViTError(f"{path} holds no images; give image files, or a folder with images directly in it")
        found += [str(path / one) for one in in_natural_order(inside)]
    return found


@torch.inference_mode()
def predict(
    model: nn.Module,
    paths: Sequence[str],
    config: Mapping[str, Any],
    spec: Mapping[str, int] | None = None,
    top: int = 5,
    names: Sequence[str] | None = None,
) -> list[list[dict[str, Any]]]:
    """The most likely classes of images.

    Args:
        model: From images to logits, or a `SuperNet`.
        paths: Image files.
        config: How images are prepared, timm's data configuration.
        spec: Sub-network to run, for a `SuperNet`.
        top: How many classes.
        names: Of the classes; those of the model if None.

    Returns:
        For every image ``{"class": number, "name": text or None, "probability": share}``, the most likely first.

    Raises:
        StrataViTError: A file is not an image, the model outputs features, or there are other than one name per class.
    """
    classes = classes_of(model)
    if not classes:
        raise StrataViTError("predict: the model outputs features, not classes; give a model with a head")
    known: Sequence[str | None] = names or class_names_of(model) or [None] * classes
    if len(known) != classes:
        raise StrataViTError(
            f"predict: got names of {len(known)} classes, the model's head has {classes}; give as many"
        )
    listing = Listing(Path(), [(path, "") for path in paths])
    images = ImageFolder.unlabelled(listing, config)
    found = []
    with measured_at(model, spec) as run:
        for number in range(len(images)):  # one by one: they are few, and a file that is no image is named at once
            image, _, path = images[number]
            if image is None:
                raise StrataViTError(
                    f"{shown(path)} is no image that Pillow can read; give image files, or folders of them"
                )
            logits = tensor_of(run(image[None].to(model_device(model), model_dtype(model))))
            shares, best = logits.float().softmax(-1)[0].topk(min(top, classes))
            rows = zip(best.tolist(), shares.tolist(), strict=True)
            found.append([{"class": one, "name": known[one], "probability": share} for one, share in rows])
    return found
