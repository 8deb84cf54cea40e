"""Images that need no labels, held in memory: from a folder of any form, or from a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.data.batches import batches_of
from stratavit.data.image_files import all_images
from stratavit.data.image_folder import ImageFolder, ImageLoader
from stratavit.data.splits import split_folder
from stratavit.errors import StrataViTError


def images_in(
    images: str | Path | Iterable[Any], model: nn.Module, data_config: Mapping[str, Any], limit: int, workers: int = 0
) -> Tensor:
    """All images of a folder or a loader, prepared for a model, in float16: ``[N, C, H, W]``.

    Args:
        images: A folder, in which images may lie anywhere (below ``train/``, if there is one), or batches of images,
            see `batches.unpack`; labels are not looked at.
        model: That takes them.
        data_config: timm's data configuration of the model.
        limit: At most this many, of a folder evenly spread.
        workers: Processes that read a folder.

    Raises:
        StrataViTError: There are fewer than two, or they do not suit the model.
    """
    loader = _folder(Path(images), data_config, limit, workers) if isinstance(images, str | Path) else images
    found, count = [], 0
    for batch, _ in batches_of(loader, model, finite=True):
        found.append(batch[: limit - count].cpu().half())
        count += len(found[-1])
        if count == limit:
            break
    if isinstance(loader, ImageLoader):
        loader.close()
    if count < 2:
        raise StrataViTError(f"images: found {count}, expected at least 2, one to learn from and one to measure on")
    return torch.cat(found)


def _folder(folder: Path, data_config: Mapping[str, Any], limit: int, workers: int) -> ImageLoader:
    listing = all_images(split_folder(folder, "train"))
    return ImageLoader(ImageFolder.unlabelled(listing, data_config), workers=workers, limit=limit)
