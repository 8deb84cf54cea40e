"""Linear probing in closed form: one ridge regression from features to classes, fitted on a labelled bank.

Shape legend: B images, n images of the bank, D feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.data.pixels import keys_of, uniforms
from stratavit.errors import StrataViTError
from stratavit.evaluation.accuracy import Metrics, Tally, labelled
from stratavit.evaluation.features import features
from stratavit.interop.libraries import as_timm
from stratavit.utils.model import measured_at

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean variance of a feature
HELD_BACK = 0.2  # of the bank, to choose among these
TEMPERATURE = 0.1  # scores are divided by it for the cross-entropy; those of the right class are near 1


@torch.inference_mode()
def linear_probe(
    model: nn.Module,
    bank: Iterable[Any],
    loader: Iterable[Any],
    spec: Mapping[str, int] | None = None,
    ridge: float | None = None,
    description: str = "linear probe",
) -> Metrics:
    """Classifies images by a linear map of their features, fitted on a labelled bank by one ridge regression.

    The features are those of `knn`, of length 1; of a model that returns all tokens the mean of the patches. Targets
    are one-hot. The normal equations, of width D + 1, are solved in float64; the intercept is not shrunk.

    Args:
        model: Any timm model, or a `SuperNet`; bank and images are seen by the same sub-network.
        bank: Yields ``(images, labels)`` to fit on.
        loader: Yields ``(images, labels)`` to classify.
        spec: Sub-network to run, for a `SuperNet`.
        ridge: Strength as a share of the mean variance of a feature. None takes the one of `RIDGES` that has the
            smallest squared error on a fifth of the bank, drawn by the pixels, fitted on the rest.
        description: Title of the progress bar.

    Returns:
        top-1 and top-5 in percent, mean cross-entropy of the scores over `TEMPERATURE` in nats, number of images.

    Raises:
        StrataViTError: No images or labels, labels below 0, or the ridge is not above 0.
    """
    if ridge is not None and not 0 < ridge < float("inf"):
        raise StrataViTError(f"linear probe: expected a ridge above 0, got {ridge!r}")
    model = as_timm(model)
    with measured_at(model, spec) as inner:
        known = [(features(inner, x), y, keys_of(x)) for x, y in labelled(bank, model, f"{description}, bank")]
        if not known:
            raise StrataViTError("linear probe: the bank has no images; a generator is used up after one pass")
        labels = torch.cat([y for _, y, _ in known])
        if int(labels.min()) < 0:  # as data sets mark images without one
            raise StrataViTError(f"linear probe: the bank has the label {int(labels.min())}, expected class numbers")
        keys = [key for *_, some in known for key in some]
        weights = fitted(torch.cat([x for x, *_ in known]).cpu(), labels.cpu(), uniforms(keys, 0) < HELD_BACK, ridge)
        classes, tally = weights.shape[1], Tally()
        for images, truth in labelled(loader, model, description):
            scores = scores_of(features(inner, images).cpu(), weights) / TEMPERATURE  # [B, K]
            unknown = max(0, int(truth.max()) + 1 - classes)  # classes that the bank lacks are ranked last
            tally.add(F.pad(scores, (0, unknown), value=float(scores.min()) - 1), truth)
    return tally.metrics()


def fitted(found: Tensor, labels: Tensor, held: Tensor, ridge: float | None = None) -> Tensor:
    """The linear map ``[D + 1, K]`` float64 from features and a one to scores of the classes.

    Args:
        found: Features ``[n, D]``.
        labels: ``[n]``.
        held: Which images are held back to choose a ridge, ``[n]`` bool.
        ridge: See `linear_probe`.
    """
    x, y = _with_one(found), F.one_hot(labels.long()).double()  # [n, D + 1], [n, K]
    if ridge is None and held.any() and not held.all():
        errors = {}
        for one, weights in zip(RIDGES, _solved(x[~held], y[~held], RIDGES), strict=True):
            errors[one] = float((x[held] @ weights - y[held]).square().sum())
        ridge = min(errors, key=lambda one: errors[one])
    return _solved(x, y, (1e-2 if ridge is None else ridge,))[0]  # a bank of a few images


def scores_of(found: Tensor, weights: Tensor) -> Tensor:
    """Scores ``[B, K]`` float32 of features ``[B, D]``, by what `fitted` has found."""
    return (_with_one(found) @ weights).float()


def _solved(x: Tensor, y: Tensor, ridges: Iterable[float]) -> list[Tensor]:
    """Weights ``[D + 1, K]`` of least squares with each of the ridges; the last row is not shrunk."""
    gram, right = x.T @ x, x.T @ y
    variance = float((x - x.mean(dim=0)).square().sum()) / (x.shape[1] - 1)  # of all images, mean over features
    shrunk = torch.eye(x.shape[1], dtype=x.dtype)
    shrunk[-1, -1] = 0
    return [torch.linalg.solve(gram + ridge * max(variance, 1e-12) * shrunk, right) for ridge in ridges]


def _with_one(found: Tensor) -> Tensor:
    """Features ``[B, D]`` to ``[B, D + 1]`` float64, the last all ones."""
    return F.pad(found.double(), (0, 1), value=1.0)
