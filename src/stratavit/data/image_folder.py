"""Images from a folder, prepared the way the model was trained, through timm's transforms."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stratavit.data.batches import OUT_OF_MEMORY_HINT, watched
from stratavit.data.class_names import MEND, Numbering, numbered, other_order
from stratavit.data.image_files import Listing, class_folders, list_images
from stratavit.data.image_reading import decoded, open_image
from stratavit.data.splits import SPLITS, find_split, split_folder, unused_splits
from stratavit.errors import StrataViTError, described, one_line, out_of_memory
from stratavit.utils.progress import say
from stratavit.utils.signals import hush

Sample = tuple[Tensor | None, int, str]
Opener = Callable[[str], Image.Image | Tensor]


class ImageFolder(Dataset[Sample]):
    """Labelled images under ``folder/<class>/``; an unreadable image is None in place of a tensor.

    Args:
        listing: See `image_files.list_images`.
        numbering: See `class_names.numbered`.
        data_config: timm's data configuration (input size, mean, std, interpolation, crop).
        opener: Opens what a path of the listing stands for, as a picture or as an image that is prepared already.

    Attributes:
        samples: Path and number of the class of every image.

    Raises:
        StrataViTError: The model takes images of other than 1 or 3 channels.
    """

    def __init__(
        self, listing: Listing, numbering: Numbering, data_config: Mapping[str, Any], opener: Opener = open_image
    ) -> None:
        self.listing, self.numbering, self.opener = listing, numbering, opener
        self.samples = [(path, numbering.index[name]) for path, name in listing.samples]
        channels = data_config["input_size"][0]
        if channels not in (1, 3):
            raise StrataViTError(
                f"images have 1 or 3 channels, the model expects {channels}; pass your own loader in Python"
            )
        self.mode = "L" if channels == 1 else "RGB"
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        config = {key: data_config[key] for key in keys if key in data_config}
        self.transform = create_transform(**config, is_training=False)

    @classmethod
    def unlabelled(cls, listing: Listing, data_config: Mapping[str, Any], opener: Opener = open_image) -> ImageFolder:
        """Images of no class: all have number 0, and ``""`` for a class folder."""
        return cls(listing, Numbering(("",), {"": 0}, "alike"), data_config, opener)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        picture, size = None, ""
        try:
            image = self.opener(path)
            if isinstance(image, Tensor):
                return image, label, path
            with image:
                size = f", which says it has {image.width} x {image.height} pixels"
                picture = decoded(image, self.mode, path)
            return self.transform(picture), label, path
        except StrataViTError:  # sound, but of an unknown scale
            raise
        except Exception as error:  # Pillow's errors differ by format; others are of timm or torchvision
            if out_of_memory(error):  # the image is sound: without it the others would be another set
                raise StrataViTError(
                    f"data: memory ran out while {path} was read{size}; take it out, or {OUT_OF_MEMORY_HINT}"
                ) from error
            if picture is None:  # damaged
                return None, label, path
            raise StrataViTError(f"data: {path} cannot be prepared ({one_line(error)}); take it out") from error


class ImageLoader:
    """Batches ``(images [B, C, H, W], labels [B])`` of an `ImageFolder`, leaving unreadable images out.

    Their number and the first one's name are printed on standard error after each pass, and their names kept in
    `unreadable`. May be run through any number of times. Worker processes stay from one pass to the next, until
    `close`, a pass that is given up, or the end of the loader.
    """

    def __init__(self, dataset: ImageFolder, batch_size: int = 64, workers: int = 0, limit: int | None = None) -> None:
        self.dataset = dataset
        count = len(dataset) if limit is None else min(limit, len(dataset))
        # evenly spread over the classes, which lie one after another in the folder's order
        self.chosen = [index * len(dataset) // count for index in range(count)]
        self._torch_loader = partial(
            DataLoader,
            Subset(dataset, self.chosen),
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_quietly,
            generator=torch.Generator(),  # nothing here is random; not to draw from everyone's
        )
        self.loader: DataLoader[Any] = self._torch_loader(persistent_workers=workers > 0)
        self._running = False
        self.unreadable: list[str] = []

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by their numbers: of the class map, of the model, or of the folders."""
        return self.dataset.numbering.names

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._running:  # a pass within a pass: the workers that stay serve one at a time
            yield from self._batches(self._torch_loader())
            return
        self._running, complete = True, False
        try:
            yield from self._batches(self.loader)
            complete = True
        finally:
            self._running = False
            if not complete:
                self.close()

    def _batches(self, batches: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        unreadable: list[str] = []
        with watched("images: "):
            for images, labels, failed in batches:
                unreadable += failed
                if len(images):
                    yield images, labels
        if unreadable and unreadable != self.unreadable:
            print(f"left out {len(unreadable)} unreadable images, first {unreadable[0]}", file=sys.stderr)
        self.unreadable = unreadable

    def close(self) -> None:
        """Ends the worker processes; the next pass starts others."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def rest(*loaders: Any) -> None:
    """Ends the workers of the image loaders among these, which are not needed for a while."""
    for loader in loaders:
        if isinstance(loader, ImageLoader):
            loader.close()


def _leave_quietly(worker: int) -> None:
    """A signal that ends all processes of a group is reported by the first of them only."""
    hush()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    good = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [path for image, _, path in samples if image is None]


def image_loader(
    data: str | Path,
    data_config: Mapping[str, Any],
    split: str,
    num_classes: int | None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    class_names: Sequence[str] | None = None,
) -> ImageLoader:
    """A loader over a folder of images in timm's evaluation transform.

    A class is a folder directly below the split. Its number follows the class map; else the names of the model's
    classes, if the folders are called so; else the natural order (2 before 10) of the class folders of the training
    split, or of those here if there is none. What was used, and what was left out, is printed on standard error.

    Args:
        data: A folder with ``train/`` and ``val/`` (or either), or the class folders themselves. Other names are
            ``training``, ``valid``, ``validation`` and, where there is none of these, ``test`` and ``testing``, in any
            case of letters.
        data_config: timm's data configuration of the model, such as ``net.data_config``.
        split: ``train`` or ``val``.
        num_classes: Classes of the model's head; None or 0 (features): not checked.
        class_map: Text file with one class folder name per line; the line number is the class index.
        batch_size, workers: Of torch's DataLoader.
        limit: At most this many images, spread evenly over the folder.
        class_names: Names of the model's classes in the order of the head, see `class_names_of`.

    Returns:
        Batches ``(images [B, C, H, W], labels [B])``, float32 and int64; may be run through any number of times.

    Raises:
        StrataViTError: The folder is missing, empty, or there are two for one split; its classes do not match the
            head, the class map, the names or the training split.
    """
    if split not in SPLITS:
        raise StrataViTError(f"split: expected {' or '.join(map(repr, SPLITS))}, got {described(split)}")
    folder = split_folder(data, split)
    train = find_split(data, "train") if split == "val" else None
    listed = None if train is None else partial(class_folders, train)
    bare = folder == Path(data)
    listing = list_images(folder, bare)
    numbering = numbered(folder, listing.classes, class_map, class_names, listed, num_classes)
    found = len(numbering.names)
    if num_classes and found != num_classes:
        what = "class folders" if class_map is None else "classes in the class map"
        raise StrataViTError(
            f"data: {folder} has {found} {what}, but the model's head has {num_classes} classes; {MEND}, or a model "
            "whose head matches (--num-classes, when fine-tuning --new-head)"
        )
    dataset = ImageFolder(listing, numbering, data_config)
    if os.environ.get("RANK", "0") == "0":  # one process reports
        _report(listing, numbering, [] if bare else unused_splits(data, split, folder), bool(num_classes))
    return ImageLoader(dataset, batch_size, workers, limit)


def _report(listing: Listing, numbering: Numbering, unused: list[str], head: bool) -> None:
    """Prints what is read, how it is numbered, and what was left out."""
    aside = f" ({', '.join(f'{name}/' for name in unused)} not used)" if unused else ""
    lines = [
        f"{listing.folder}{aside}: {len(listing.samples)} images in {len(listing.classes)} class folders, numbered "
        f"{numbering.how}"
    ]
    order = other_order(numbering.names) if head and numbering.positions else None
    if order is not None:
        lines.append(
            f"{listing.folder}: class folder {order[0]} comes before {order[1]} here; torchvision and datasets sort by "
            f"letters, the other way round: if the model was trained in their order, {MEND}"
        )
    for line in lines + listing.notes():
        say(f"data: {line}")
