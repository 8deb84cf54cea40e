"""Images from a folder, prepared the way the model was trained, through timm's readers and transforms."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stratavit.batches import LESS, guarded
from stratavit.errors import StrataViTError, described, one_line, out_of_memory
from stratavit.folders import read_small

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "test")}
Sample = tuple[Tensor | None, int, str]


class ImageFolder(Dataset[Sample]):
    """Labelled images under ``folder/<class>/``; an unreadable image gives None in place of a tensor.

    Args:
        folder: Holds one folder of images per class.
        data_config: timm's data configuration (input size, mean, std, interpolation, crop).
        class_map: Text file with one class folder name per line; the line number is the class index.
            Without it the folders are numbered in natural order.

    Raises:
        StrataViTError: No images, or a class folder that the class map does not know.
    """

    def __init__(self, folder: Path, data_config: Mapping[str, Any], class_map: str | Path | None = None) -> None:
        check_links(folder)
        self.class_index = None if class_map is None else read_class_map(Path(class_map))
        try:
            self.reader = create_reader("", root=str(folder), class_map=self.class_index or "")
        except RuntimeError as error:
            reason = "none of its class folders is in the class map" if class_map else "expected <class>/<image>"
            raise StrataViTError(f"{folder} holds no usable images: {reason}") from error
        self.classes = len({label for _, label in self.reader.samples})
        if self.class_index is not None:
            present = {path.name for path in folder.iterdir() if path.is_dir()}
            unknown = sorted(present - self.class_index.keys())
            if unknown:
                raise StrataViTError(
                    f"{folder / unknown[0]} is not a class of {class_map} ({len(unknown)} such folders)"
                )
        channels = data_config["input_size"][0]
        if channels not in (1, 3):
            raise StrataViTError(
                f"images have 1 or 3 channels, the model expects {channels}; give your own loader in Python"
            )
        self.mode = "L" if channels == 1 else "RGB"
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        self.transform = create_transform(
            **{key: data_config[key] for key in keys if key in data_config}, is_training=False
        )

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.reader.samples[index]
        size: tuple[int, int] | None = None
        try:
            # from memory: of a file, parts of a damaged length would be made room for before it is found too short
            with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
                if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
                    return None, label, path
                size = image.size
                picture = image.convert(self.mode)
        except Exception as error:  # what Pillow raises for damage differs with the format that it takes a file for
            if out_of_memory(error):  # no damage: without this image the others would be another set
                raise _too_large(path, size) from error
            return None, label, path
        try:
            return self.transform(picture), label, path
        except Exception as error:  # of timm, torchvision or Pillow
            if out_of_memory(error):
                raise _too_large(path, size) from error
            raise StrataViTError(f"data: {path} cannot be prepared ({one_line(error)}); take it out") from error


def _too_large(path: str, size: tuple[int, int] | None) -> StrataViTError:
    said = "" if size is None else f", which says it has {size[0]} x {size[1]} pixels"
    return StrataViTError(f"data: memory ran out while {path} was read{said}; take it out, or {LESS}")


class ImageLoader:
    """Batches ``(images [B, C, H, W], labels [B])`` of an `ImageFolder`, leaving unreadable images out.

    Their number and the first one's name are told on standard error after each pass, and kept in
    `unreadable`. May be run through any number of times.
    """

    def __init__(self, dataset: ImageFolder, batch_size: int = 64, workers: int = 0, limit: int | None = None) -> None:
        self.dataset = dataset
        count = len(dataset) if limit is None else min(limit, len(dataset))
        # evenly spread over the classes, which lie one after another in the folder's order
        indices = [index * len(dataset) // count for index in range(count)] if count else []
        subset = torch.utils.data.Subset(dataset, indices)
        self.loader = DataLoader(
            subset, batch_size, num_workers=workers, collate_fn=_collate, worker_init_fn=_leave_quietly
        )
        self.unreadable: list[str] = []

    @property
    def classes(self) -> int:
        """Number of classes: those of the class map, or the folders."""
        index = self.dataset.class_index
        return self.dataset.classes if index is None else len(index)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        unreadable: list[str] = []
        for images, labels, failed in guarded(self.loader, "images"):
            unreadable += failed
            if len(images):
                yield images, labels
        if unreadable and unreadable != self.unreadable:
            print(f"left out {len(unreadable)} unreadable images, first {unreadable[0]}", file=sys.stderr)
        self.unreadable = unreadable


def _leave_quietly(worker: int) -> None:
    """What ends all processes of a group is told by the first of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    good = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [path for image, _, path in samples if image is None]


def check_links(folder: Path) -> None:
    """Whether a folder can be walked to its end: timm's reader follows links.

    Raises:
        StrataViTError: A link leads back to a folder that holds it, so that images would be found many times.
    """
    waiting: list[tuple[str, tuple[str, ...]]] = [(str(folder), ())]
    while waiting:
        path, above = waiting.pop()
        real = os.path.realpath(path)
        if real in above:
            raise StrataViTError(f"data: {path} is a link to a folder that holds it; take it out")
        try:
            with os.scandir(path) as entries:
                waiting += [(entry.path, (*above, real)) for entry in entries if _is_folder(entry)]
        except OSError as error:
            raise StrataViTError(f"data: {path} cannot be read ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_class_map(path: Path) -> dict[str, int]:
    """Class folder name -> index from a text file of one name per line.

    Raises:
        StrataViTError: The file is not readable text, or names a class twice.
    """
    try:
        names = [line.strip() for line in read_small(path).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StrataViTError(f"class map {path}: cannot be read as text, one class folder name per line") from error
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated or not names:
        what = f"{described(repeated[0])} appears twice" if repeated else "is empty"
        raise StrataViTError(f"class map {path}: {what}")
    return {name: index for index, name in enumerate(names)}


def split_folder(data: str | Path, split: str) -> Path:
    """Where the class folders of a split are; worth asking before a model is fetched.

    Raises:
        StrataViTError: There is no such folder.
    """
    root = Path(data)
    if not root.is_dir():
        raise StrataViTError(
            f"data: {root} is not a folder; expected train/ and val/ with one folder of images per class"
        )
    folder = next((root / name for name in _SPLITS[split] if (root / name).is_dir()), root)
    if folder == root and any((root / name).is_dir() for names in _SPLITS.values() for name in names):
        raise StrataViTError(f"data: {root} has no {split}/ folder, which is needed here")
    return folder


def image_loader(
    data: str | Path,
    data_config: Mapping[str, Any],
    split: str,
    num_classes: int | None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
) -> ImageLoader:
    """A loader over a folder of images in timm's evaluation transform.

    Args:
        data: A folder with ``train/`` and ``val/`` (or either), or the class folders themselves.
        data_config: timm's data configuration of the model.
        split: ``train`` or ``val``.
        num_classes: Classes of the model's head; None or 0 (features): not checked.
        class_map: See `ImageFolder`.
        batch_size, workers: Of torch's DataLoader.
        limit: At most this many images, spread evenly over the folder.

    Raises:
        StrataViTError: The folder is missing, empty, or its classes do not match the head.
    """
    folder = split_folder(data, split)
    dataset = ImageFolder(folder, data_config, class_map)
    loader = ImageLoader(dataset, batch_size, workers, limit)
    found = loader.classes
    if num_classes and found != num_classes:
        what = "class folders" if dataset.class_index is None else "classes in the class map"
        raise StrataViTError(
            f"data: {folder} has {found} {what}, but the model's head has {num_classes} classes; "
            "give --class-map FILE (one class folder name per line), or a model whose head matches (--num-classes, "
            "when fine-tuning --new-head)"
        )
    return loader
