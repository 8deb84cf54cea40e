"""Accuracy of a model on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.data.batches import batches_of, check_labels
from stratavit.errors import StrataViTError
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.utils.devices import to_device
from stratavit.utils.model import classes_of, measured_at, model_device, model_dtype
from stratavit.utils.progress import track


@dataclass(frozen=True)
class Metrics:
    """Accuracy over a data set.

    Attributes:
        top1, top5: Percent of images whose true class is ranked first, or among the first five.
        loss: Mean cross-entropy, nats.
        n: Number of images.
    """

    top1: float
    top5: float
    loss: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """The metrics as plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f} over {self.n} images"


@dataclass
class Tally:
    """Correct images and summed loss so far."""

    first: int = 0
    fifth: int = 0
    loss: float = 0.0
    n: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits ``[B, classes]`` float, labels ``[B]``.

        Raises:
            StrataViTError: A logit is NaN, or a label is not one of the classes.
        """
        check_labels(labels, logits.shape[-1])  # where they are: read back from a GPU, they would be waited for
        labels = to_device(labels, logits.device)
        hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]  # [B, 5]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = logits.isnan().any(), hits[:, 0].sum(), hits.any(dim=-1).sum(), loss
        has_nan, first, fifth, summed = torch.stack([one.to(loss) for one in found]).tolist()  # waits once
        if has_nan:
            raise StrataViTError("evaluate: the model outputs NaN; check its weights, and whether its type overflows")
        self.first += int(first)
        self.fifth += int(fifth)
        self.loss += summed
        self.n += len(labels)

    def metrics(self) -> Metrics:
        """The means; a StrataViTError if nothing was added."""
        if self.n == 0:
            raise StrataViTError("evaluate: the loader has no images; check the data folder or the loader")
        return Metrics(100 * self.first / self.n, 100 * self.fifth / self.n, self.loss / self.n, self.n)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Any], spec: Mapping[str, int] | None = None, description: str = "evaluate"
) -> Metrics:
    """Runs a model over labelled images in eval mode.

    Args:
        model: Any model from images to logits, or a `SuperNet`.
        loader: Yields ``(images [B, 3, H, W], labels [B])``, or mappings of these, see `batches.unpack`.
        spec: Sub-network to run, for a `SuperNet`.
        description: Title of the progress bar.

    Returns:
        top-1 and top-5 in percent, mean cross-entropy in nats, number of images.

    Raises:
        StrataViTError: No images, no labels, images or labels that do not fit the model, NaN, or no head.
    """
    if not classes_of(model):
        raise StrataViTError(
            "evaluate: the model outputs features, not classes; measure it by nearest neighbours (stratavit.knn, "
            "--knn), a linear probe (stratavit.linear_probe, --probe), text embeddings (stratavit.zero_shot, "
            "--zero-shot FILE), or against its source (stratavit.compare_outputs, --agreement)"
        )
    tally = Tally()
    with measured_at(model, spec) as run:
        for images, labels in labelled(loader, model, description):
            images = to_device(images, model_device(model), model_dtype(model))
            tally.add(tensor_of(run(images)).float(), labels)
    return tally.metrics()


def labelled(loader: Iterable[Any], model: nn.Module, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, which must have labels (else a StrataViTError), with a progress bar."""
    for images, labels in batches_of(track(loader, description), model, finite=True):
        if labels is None:
            raise StrataViTError(f"{description}: the loader gives no labels; accuracy needs (images, labels)")
        yield images, labels
