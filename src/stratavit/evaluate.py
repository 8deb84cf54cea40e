"""Accuracy of a model on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stratavit.batches import check_labels, unpack
from stratavit.errors import StrataViTError
from stratavit.progress import track
from stratavit.structure import eval_mode, model_device, model_dtype


@dataclass(frozen=True)
class Metrics:
    """Accuracy over a data set.

    Attributes:
        top1, top5: Percent of images whose true class is the first, or among the first five, answers.
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


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Any], spec: Mapping[str, int] | None = None, description: str = "evaluate"
) -> Metrics:
    """Runs a model over labelled images in eval mode.

    Args:
        model: Any model from images to logits, or a `SuperNet`.
        loader: Yields ``(images [B, 3, H, W], labels [B])``.
        spec: Sub-network to run, for a `SuperNet`.
        description: Title of the progress bar.

    Raises:
        StrataViTError: No images, no labels, or labels that do not fit the head.
    """
    first = fifth = n = 0
    loss = 0.0
    with eval_mode(model):
        for batch in track(loader, description):
            images, labels = unpack(batch)
            if labels is None:
                raise StrataViTError("evaluate: the loader gives no labels; accuracy needs (images, labels)")
            images = images.to(model_device(model), model_dtype(model))
            logits = (model(images) if spec is None else model(images, spec)).float()
            check_labels(labels, logits.shape[-1])
            labels = labels.to(logits.device)
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # [B, 5]
            hits = best == labels[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.any(dim=-1).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            n += len(labels)
    if n == 0:
        raise StrataViTError("evaluate: the loader gave no images; check the data folder or the loader")
    return Metrics(100 * first / n, 100 * fifth / n, loss / n, n)
