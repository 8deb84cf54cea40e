"""Images that need no labels, in the forms in which people have them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from stratavit.data.batches import batches_of, unpack
from stratavit.data.image_files import Listing, all_images, in_natural_order, some
from stratavit.data.image_folder import ImageFolder, ImageLoader, Opener
from stratavit.data.image_reading import open_image
from stratavit.data.items import DataSetImages, is_data_set, pictures
from stratavit.data.named_data_sets import is_named, load_named, one_split
from stratavit.data.splits import kind_of_split, split_at_the_end, split_folder
from stratavit.data.tar_files import TarImages, is_tar
from stratavit.errors import StrataViTError, described
from stratavit.utils.progress import say

Images = str | Path | Sequence[str | Path] | Iterable[Any]  # see `opened`
FORMS = (
    "a folder of images, a .tar file or a folder of them, hfds/NAME (a data set of Hugging Face); in Python also a "
    "list of paths, a data set or a loader"
)
_NUMBER = re.compile(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?$")  # of a shard


class UnlabelledLoader:
    """Batches ``(images [B, C, H, W], None)`` of an `ImageLoader`; may be run through any number of times."""

    def __init__(self, loader: ImageLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return ((images, None) for images, _ in self.loader)


def opened(
    images: Images,
    data_config: Mapping[str, Any],
    limit: int,
    batch_size: int = 64,
    workers: int = 0,
) -> UnlabelledLoader | Iterator[tuple[Tensor, Tensor | None]]:
    """Images in any form as batches for a model.

    Args:
        images: A folder, in which images may lie anywhere (below ``train/``, if there is one); a tar file, or a folder
            of them (shards); ``hfds/NAME``, see `load_named`; a sequence of paths of images, folders or tar files; a
            data set of torch or datasets, or a sequence, of pictures or of samples with one (`items.pictures`). Of
            these forms labels are not read. Or an iterable of batches, see `batches.unpack`, which keep their labels,
            or of samples or batches of pictures.
        data_config: timm's data configuration of the model.
        limit: At most this many; evenly spread, of an iterable the first.
        batch_size, workers: Images of a batch, and processes that read; of an iterable pictures alone are batched.

    Returns:
        Batches; of an iterable for one pass.

    Raises:
        StrataViTError: There are no images, or they are in none of these forms.
    """
    opener: Opener
    if is_named(images):
        images = load_named(cast(str, images))
    if isinstance(images, Mapping) and all(hasattr(one, "column_names") for one in images.values()):
        images = one_split(images)
    if isinstance(images, str | Path):
        listing, opener = _listed([_in_place(Path(images))])
        listing.folder = Path(images)
    elif _is_paths(images):
        listing, opener = _listed([Path(path) for path in cast(Sequence[str], images)])
    elif is_data_set(images):
        listing, opener = _listed_samples(images)
    else:
        return _first(images, data_config, limit, batch_size)
    if not listing.samples:
        raise StrataViTError("data: the list or data set is empty; expected images")
    folder = ImageFolder.unlabelled(listing, data_config, opener)
    return UnlabelledLoader(ImageLoader(folder, batch_size, workers, limit))


def check_there(images: Images) -> None:
    """Checks that a folder or file exists, before anything slow is done; other forms are not looked at.

    Raises:
        StrataViTError: It does not.
    """
    if isinstance(images, str | Path) and not is_named(images):
        _in_place(Path(images))


def images_in(images: Images, model: nn.Module, data_config: Mapping[str, Any], limit: int, workers: int = 0) -> Tensor:
    """All images, prepared for a model, in float16: ``[N, C, H, W]``.

    Args:
        images: See `opened`; labels are not looked at.
        model: That takes them.
        data_config: timm's data configuration of the model.
        limit: At most this many.
        workers: Processes that read them.

    Raises:
        StrataViTError: There are fewer than two, or they do not suit the model.
    """
    loader = opened(images, data_config, limit, workers=workers)
    found = [batch.cpu().half() for batch, _ in batches_of(loader, model, finite=True)]
    if isinstance(loader, UnlabelledLoader):
        loader.loader.close()
    count = sum(map(len, found))
    if count < 2:
        raise StrataViTError(f"images: found {count}, expected at least 2, one to learn from and one to measure on")
    return torch.cat(found)


def _in_place(path: Path) -> Path:
    """What a single path stands for: a tar file, or a folder, of splits that to train on."""
    if is_tar(path) and path.is_file():
        return path
    if not path.is_dir():
        raise StrataViTError(f"data: {path} is not a folder, nor a .tar file; expected {FORMS}")
    return split_folder(path, "train")


def _shards(folder: Path) -> list[Path]:
    """The tar files of a folder, without those that are named for other splits than training."""
    shards = [Path(folder, name) for name in in_natural_order(os.listdir(folder)) if is_tar(name)]
    training = [shard for shard in shards if _kind(shard) in (None, "train")]
    if training and len(training) < len(shards):
        left = some(shard.name for shard in shards if shard not in training)
        say(f"data: {folder}: {len(shards) - len(training)} tar files not used ({left})")
    return training or shards


def _kind(shard: Path) -> str | None:
    """The split that the name of a shard says, such as ``imagenet1k-validation-00.tar``."""
    stem = _NUMBER.sub("", shard.stem)
    end = split_at_the_end(stem)
    return end[1] if end else kind_of_split(stem)


def _listed(paths: Sequence[Path]) -> tuple[Listing, _Opener]:
    """Every image of files, folders and tar files, and what opens it."""
    found, tars = Listing(Path()), TarImages()
    for path in paths:
        if path.is_dir() and not is_tar(path):
            inside = _of_folder(path, tars)
            found.samples += inside.samples
            found.hidden += inside.hidden
            found.passed += inside.passed
        else:
            found.samples += [(name, "") for name in (tars.add(path) if is_tar(path) else [str(path)])]
    return found, _Opener(tars)


def _of_folder(folder: Path, tars: TarImages) -> Listing:
    """The images in a folder, or in its tar files if it holds no others."""
    try:
        return all_images(folder)
    except StrataViTError:
        shards = _shards(folder)
        if not shards:
            raise
    return Listing(folder, [(name, "") for shard in shards for name in tars.add(shard)])


class _Opener:
    """Opens files, and members of tar files."""

    def __init__(self, tars: TarImages) -> None:
        self.tars = tars

    def __call__(self, path: str) -> Image.Image:
        return self.tars(path) if path in self.tars else open_image(path)


def _is_paths(images: Any) -> bool:
    return isinstance(images, list | tuple) and bool(images) and all(isinstance(one, str | Path) for one in images)


def _first(
    images: Any, data_config: Mapping[str, Any], limit: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The first images of an iterable of batches, or of pictures in any form, as batches."""
    if not isinstance(images, Iterable):
        raise StrataViTError(f"images: expected {FORMS}, got {described(images)}")
    waiting: list[Any] = []
    damaged = count = 0
    for found in images:
        try:
            inside = pictures(found)
        except OSError:
            damaged += 1
            continue
        if inside:
            waiting += inside[: limit - count - len(waiting)]
        else:
            batch, labels = unpack(found)
            batch = batch[: limit - count]
            yield batch, None if labels is None else labels[: len(batch)]
            count += len(batch)
        if len(waiting) >= batch_size:
            yield from _prepared(waiting, data_config, batch_size)
            count, waiting = count + len(waiting), []
        if count + len(waiting) >= limit:
            break
    if waiting:
        yield from _prepared(waiting, data_config, batch_size)
    if damaged:
        print(f"left out {damaged} unreadable images", file=sys.stderr)
    if not count + len(waiting):
        raise StrataViTError(
            "images: the loader gave no images that can be read; a generator is used up after one pass, give a list or "
            "a DataLoader"
        )


def _listed_samples(samples: Any) -> tuple[Listing, DataSetImages]:
    """Every image of a data set or a sequence of samples, and what opens it."""
    source = DataSetImages(samples)
    return Listing(Path(), [(name, "") for name in source.names]), source


def _prepared(found: list[Any], data_config: Mapping[str, Any], batch_size: int) -> UnlabelledLoader:
    listing, opener = _listed_samples(found)
    return UnlabelledLoader(ImageLoader(ImageFolder.unlabelled(listing, data_config, opener), batch_size))
