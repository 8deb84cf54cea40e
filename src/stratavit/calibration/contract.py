"""The first step of a conversion: knowledge sorted inside every module, the function kept. No training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from stratavit.calibration import contraction
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.method import Method, known_method
from stratavit.calibration.objectives import Objective
from stratavit.calibration.statistics import collect
from stratavit.calibration.wpac import CRITERIA, Criterion, scatter_needed
from stratavit.errors import StrataViTError

TOKEN_WEIGHT = 0.5


def resolve_method(method: Method | None, criterion: Criterion | None) -> tuple[Method, Criterion]:
    """The method and the criterion that go together, where one or both are left out.

    Raises:
        StrataViTError: One is unknown, or they belong to different methods.
    """
    if criterion is not None and criterion not in CRITERIA:
        raise StrataViTError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    implied: Method = "default" if criterion in (None, "output") else "paper"
    method = implied if method is None else known_method(method)
    if criterion is not None and method != implied:
        raise StrataViTError(f"criterion {criterion!r} belongs to method={implied!r}, got method={method!r}")
    return method, criterion or ("output" if method == "default" else "wpac")


def sort_channels(
    model: nn.Module, loader: Iterable[Any], criterion: Criterion, objective: Objective, seed: int, token_weight: float
) -> tuple[dict[str, Any], DenseOutputs | None]:
    """Sorts the channels of every site in place, from one pass over the calibration images.

    Args:
        model: Its sites are elastic modules.
        loader: See `statistics.collect`.
        criterion: What channels are sorted by.
        objective: What is differentiated.
        seed: For ``random`` and for the objective ``sampled``.
        token_weight: For ``output``: share of a token's weight that follows the gradient norm at the module's output.

    Returns:
        Facts for the provenance; with ``output`` the dense model's answers to the images, which the pass has anyway.

    Raises:
        StrataViTError: Bad images, labels or options.
    """
    if not 0 <= token_weight <= 1:
        raise StrataViTError(f"token_weight: expected a share from 0 to 1, got {token_weight!r}")
    share = token_weight if criterion == "output" else None
    dense_outputs = None if share is None else DenseOutputs()
    statistics = collect(model, loader, objective, scatter_needed(criterion), "contract", share, seed, dense_outputs)
    contraction.apply(model, statistics, criterion, seed)
    images = next(iter(statistics.values())).images
    facts = {"criterion": criterion, "objective": objective, "images": images, "seed": seed, "token_weight": share}
    return facts, dense_outputs
