"""Images in what data sets and loaders of other libraries yield: samples and batches of pictures or tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from stratavit.data.batches import IMAGE_KEYS
from stratavit.data.image_reading import endings, open_bytes
from stratavit.errors import StrataViTError

KEYS = (*IMAGE_KEYS, "img")  # of pictures


def pictures(found: Any) -> list[Image.Image]:
    """All pictures in a sample or a batch, in order; none of tensors.

    Args:
        found: A picture, a sequence of these or of samples, or a mapping: pictures under ``pixel_values``, ``image``,
            ``images`` or ``img``, or under any key if there is one only. The content of a file counts as one: bytes
            under an ending (webdataset), or ``{"bytes": ..., "path": ...}`` (datasets, not decoded).

    Raises:
        OSError: Bytes are not an image.
        StrataViTError: A mapping holds several pictures, and no key says which.
    """
    if isinstance(found, Image.Image):
        return [found]
    if isinstance(found, list | tuple):
        return [picture for part in found for picture in pictures(part)]
    if not isinstance(found, Mapping):
        return []
    if found.keys() == {"bytes", "path"}:
        return [open_bytes(found["bytes"] or Path(found["path"]).read_bytes())]
    for key in KEYS:
        if key in found and (inside := pictures(found[key])):
            return inside
    parts = {key: value if not _is_file(key, value) else open_bytes(value) for key, value in found.items()}
    several = {key: inside for key, value in parts.items() if (inside := pictures(value))}
    if len(several) > 1:
        raise StrataViTError(
            f"images: a sample holds pictures under {' and '.join(map(str, several))}; keep one, under 'image'"
        )
    return next(iter(several.values()), [])


def _is_file(key: Any, value: Any) -> bool:
    """Whether it is the content of an image file under an ending, as in a webdataset."""
    return isinstance(value, bytes) and f".{str(key).rpartition('.')[2].lower()}" in endings()


def is_data_set(images: Any) -> bool:
    """Whether it is of known length and its samples, no batches, are found by number."""
    if isinstance(images, IterableDataset) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        return False
    if isinstance(images, Dataset) or hasattr(images, "column_names"):  # the latter of datasets
        return True
    samples = isinstance(images, list | tuple) and len(images) > 0
    return samples and isinstance(images[0], Mapping | Image.Image) and len(_opened(images[0])) == 1


def _opened(sample: Any) -> list[Image.Image]:
    try:
        return pictures(sample)
    except OSError:
        return [Image.new("L", (1, 1))]  # one that is damaged


class DataSetImages:
    """Opens the images of a data set by name; see `names`.

    Args:
        samples: A data set of torch or of datasets, or a sequence of samples.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.names = [f"image {number} of the data set" for number in range(len(samples))]
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __call__(self, name: str) -> Image.Image | Tensor:
        """A picture, or an image that is a tensor already, prepared ``[C, H, W]``.

        Raises:
            StrataViTError: The sample holds neither.
        """
        sample = self.samples[self._numbers[name]]
        found = pictures(sample)
        if len(found) == 1:
            return found[0]
        tensor = _tensor_in(sample)
        if found or tensor is None:
            kinds = _kinds(sample)
            raise StrataViTError(
                f"images: {name} is {kinds}; expected one picture, or one tensor [C, H, W] under "
                f"{' or '.join(IMAGE_KEYS)} or in the first place"
            )
        return tensor


def _tensor_in(sample: Any) -> Tensor | None:
    if isinstance(sample, Mapping):
        sample = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
    elif isinstance(sample, list | tuple):
        sample = sample[0] if sample else None
    return sample if isinstance(sample, Tensor) and sample.dim() == 3 else None


def _kinds(sample: Any) -> str:
    """Type of a sample, with those of its parts."""
    if isinstance(sample, Mapping):
        return "a mapping of " + (
            ", ".join(f"{key} ({type(part).__name__})" for key, part in sample.items()) or "nothing"
        )
    if isinstance(sample, Sequence) and not isinstance(sample, str | bytes):
        return f"{type(sample).__name__} of {', '.join(type(part).__name__ for part in sample) or 'nothing'}"
    return type(sample).__name__
