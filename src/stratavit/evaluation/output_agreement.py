"""How far the outputs of a small network are from those of its source, on images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.calibration.objectives import distance
from stratavit.data.batches import batches_of
from stratavit.errors import StrataViTError
from stratavit.interop.libraries import as_timm
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.utils.agreement import agreements
from stratavit.utils.model import classes_of, is_super_network, measured_at, model_device, model_dtype
from stratavit.utils.progress import track


@dataclass(frozen=True)
class Agreement:
    """How a network agrees with its source.

    Attributes:
        agreement: Percent of images with the same first class; of features the mean cosine, of maps that of all tokens,
            in percent.
        distance: Mean divergence KL(source || network), nats; of features and maps the mean relative squared error: the
            squared distance over the squared length, both of all tokens of an image together.
        n: Number of images.
        classes: Whether outputs are logits.
    """

    agreement: float
    distance: float
    n: int
    classes: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        words = ("same first class", "divergence (KL)") if self.classes else ("mean cosine", "relative squared error")
        shown = f"{words[0]} {self.agreement:.2f} %, {words[1]} {self.distance:.4f}"
        return f"agreement with the full network: {shown} over {self.n} images"


class OutputTally:
    """Agreement and distance, summed batch by batch.

    Args:
        classes: Of the head; 0 where outputs are features or maps.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self._agreement, self._distance, self._n = classes, 0.0, 0.0, 0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Adds a batch: outputs of a network and of its source for the same images, ``[B, ...]``."""
        found, expected = found.float(), expected.to(found.device).float()
        self._agreement += float(agreements(found, expected, bool(self.classes)).sum())
        self._distance += float(distance(found, expected, self.classes))
        self._n += len(found)

    def result(self) -> Agreement:
        """The means; a StrataViTError if nothing was added."""
        if self._n == 0:
            raise StrataViTError("agreement: the loader has no images; check the data folder or the loader")
        return Agreement(100 * self._agreement / self._n, self._distance / self._n, self._n, bool(self.classes))


@torch.inference_mode()
def compare_outputs(
    model: nn.Module,
    source: nn.Module,
    loader: Iterable[Any],
    spec: Mapping[str, int] | None = None,
    description: str = "agreement",
) -> Agreement:
    """Compares the outputs of a network with those of the model that it was made from; labels are not used.

    Args:
        model: A small model, or a `SuperNet`.
        source: The dense model, or a `SuperNet`, which runs at full size; may be `model` itself.
        loader: Yields images ``[B, 3, H, W]``, alone or with labels.
        spec: Sub-network to run, for a `SuperNet`.
        description: Title of the progress bar.

    Returns:
        Agreement and distance of logits ``[B, classes]``, features ``[B, D]``, or maps ``[B, N, C]``, ``[B, H, W, C]``.

    Raises:
        StrataViTError: The outputs are of different shapes, or there are no images.
    """
    # both run on every batch: a super-network has one size at a time
    small = model.small_at(spec or {}) if is_super_network(model) else as_timm(model)  # type: ignore[operator]
    dense, found = as_timm(source), OutputTally(classes_of(model))
    with measured_at(small, None) as run, measured_at(dense, None) as full:
        for images, _ in batches_of(track(loader, description), small, finite=True):
            ours = tensor_of(run(images.to(model_device(small), model_dtype(small))))
            theirs = tensor_of(full(images.to(model_device(dense), model_dtype(dense))))
            if ours.shape != theirs.shape:
                raise StrataViTError(
                    f"agreement: outputs are of shapes {list(ours.shape)} and {list(theirs.shape)}; give the model "
                    "that this one was made from"
                )
            found.add(ours, theirs)
    return found.result()
