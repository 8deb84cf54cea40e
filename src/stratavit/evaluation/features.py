"""Accuracy of models that output features: nearest neighbours, and text embeddings of the classes (zero-shot).

Shape legend: B images, n images of the bank, D feature width, N tokens, C token width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.choices import NEIGHBOURS as NEIGHBOURS
from stratavit.errors import ArtifactError, StrataViTError
from stratavit.evaluation.accuracy import Metrics, Tally, labelled
from stratavit.files.folders import read_tensors
from stratavit.interop.libraries import as_timm
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.models.families.base import mean_token
from stratavit.utils.model import classes_of, measured_at, model_device, model_dtype

TEMPERATURE = 0.07  # as DINO and DINOv2 are evaluated
SCALE = 100.0  # CLIP's largest
CHUNK = 4096  # images of the bank compared at once


def features(model: Any, images: Tensor) -> Tensor:
    """Unit-length features ``[B, D]`` float32 of images.

    They are the outputs of a model without a head, or what the head of another one reads; of a model that returns all
    tokens (``[B, N, C]``, ``[B, H, W, C]``) the mean of its patches, without class and register tokens.
    """
    images = images.to(model_device(model), model_dtype(model))
    if classes_of(model):
        found = model.forward_head(model.forward_features(images), pre_logits=True)
    else:
        found = tensor_of(model(images))
    if found.dim() == 3:
        found = found[:, getattr(model, "num_prefix_tokens", 0) :]
    return F.normalize(mean_token(found.float()), dim=-1)


@torch.inference_mode()
def knn(
    model: nn.Module,
    bank: Iterable[Any],
    loader: Iterable[Any],
    spec: Mapping[str, int] | None = None,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    description: str = "nearest neighbours",
) -> Metrics:
    """Classifies images by the labels of their nearest neighbours, as DINO and DINOv2 are evaluated.

    The k images of the bank that are most alike vote, each with weight ``exp(cosine / temperature)``.

    Source: Caron et al., DINO (arXiv 2104.14294), weighted nearest neighbours.

    Args:
        model: Any timm model, or a `SuperNet`; bank and images are seen by the same sub-network.
        bank: Yields ``(images, labels)`` to compare with.
        loader: Yields ``(images, labels)`` to classify.
        spec: Sub-network to run, for a `SuperNet`.
        k, temperature: See above.
        description: Title of the progress bar.

    Returns:
        top-1 and top-5 in percent, mean cross-entropy of the votes in nats, number of images.

    Raises:
        StrataViTError: No images or labels, labels below 0, or k or the temperature is not above 0.
    """
    if k < 1 or not temperature > 0:
        raise StrataViTError(f"knn: expected k of at least 1 and a temperature above 0, got {k!r} and {temperature!r}")
    model = as_timm(model)
    with measured_at(model, spec) as inner:
        known = [(features(inner, x), y) for x, y in labelled(bank, model, f"{description}, bank")]
        if not known:
            raise StrataViTError("knn: the bank has no images; a generator is used up after one pass")
        stored, labels = torch.cat([x for x, _ in known]), torch.cat([y for _, y in known]).to(known[0][0].device)
        if int(labels.min()) < 0:  # as data sets mark images without one
            raise StrataViTError(f"knn: the bank has the label {int(labels.min())}, expected numbers of classes")
        classes, tally = int(labels.max()) + 1, Tally()
        for images, truth in labelled(loader, model, description):
            logits = _votes(features(inner, images), stored, labels, classes, k, temperature).clamp_min(1e-12).log()
            unknown = max(0, int(truth.max()) + 1 - classes)  # classes that the bank lacks are ranked last
            tally.add(F.pad(logits, (0, unknown), value=float(logits.min()) - 1), truth)
    return tally.metrics()


def _votes(queries: Tensor, stored: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Share of the weighted votes of each class, ``[B, classes]``."""
    parts = [(queries @ part.T).topk(min(k, len(part)), dim=1) for part in stored.split(CHUNK)]
    values = torch.cat([part.values for part in parts], dim=1)
    indices = torch.cat([part.indices + number * CHUNK for number, part in enumerate(parts)], dim=1)
    values, chosen = values.topk(min(k, values.shape[1]), dim=1)
    weights = ((values - values[:, :1]) / temperature).exp()  # [B, k]
    votes = torch.zeros(len(queries), classes, device=queries.device)
    votes.scatter_add_(1, labels[indices.gather(1, chosen)], weights)
    return votes / votes.sum(dim=1, keepdim=True)


@torch.inference_mode()
def zero_shot(
    model: nn.Module,
    embeddings: Tensor,
    loader: Iterable[Any],
    spec: Mapping[str, int] | None = None,
    scale: float = SCALE,
    description: str = "zero-shot",
) -> Metrics:
    """Classifies images by the class whose text embedding is most alike (CLIP, SigLIP).

    Source: Radford et al., CLIP (arXiv 2103.00020), zero-shot classification.

    Args:
        model: An image tower that ends in the space of the embeddings, or a `SuperNet` of one.
        embeddings: ``[classes, D]``, one row per class, see `read_embeddings`; any length.
        loader: Yields ``(images, labels)``.
        spec: Sub-network to run, for a `SuperNet`.
        scale: Of the cosines, for the cross-entropy.
        description: Title of the progress bar.

    Returns:
        top-1 and top-5 in percent, mean cross-entropy in nats, number of images.

    Raises:
        StrataViTError: Widths differ, or there are no images or labels.
    """
    model, tally, rows = as_timm(model), Tally(), F.normalize(embeddings.float(), dim=-1)
    with measured_at(model, spec) as inner:
        for images, truth in labelled(loader, model, description):
            found = features(inner, images)
            if found.shape[-1] != rows.shape[-1]:
                raise StrataViTError(
                    f"zero-shot: the text embeddings have {rows.shape[-1]} numbers each, the image features "
                    f"{found.shape[-1]}; give embeddings of the text tower that belongs to this model"
                )
            tally.add(scale * found @ rows.to(found.device).T, truth)
    return tally.metrics()


def read_embeddings(path: str | Path) -> Tensor:
    """Text embeddings of the classes from a ``.safetensors`` file with one tensor ``[classes, D]``, in class order.

    Raises:
        ArtifactError: It is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"zero-shot: {path} is not a file")
    found = list(read_tensors(path).values())
    if len(found) == 1 and found[0].dim() == 2 and found[0].is_floating_point() and found[0].isfinite().all():
        return found[0]
    raise ArtifactError(f"zero-shot: {path} should hold one tensor [classes, width] of finite numbers")
