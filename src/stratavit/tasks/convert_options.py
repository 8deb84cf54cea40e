"""The options of a conversion, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from stratavit.calibration.contraction import Method, resolve_method
from stratavit.calibration.objectives import OBJECTIVES, Objective
from stratavit.calibration.sums_place import known_place
from stratavit.calibration.wpac import Criterion
from stratavit.choices import ListAxes, SumsPlace, Units
from stratavit.dropout_list.floors import MinWidth
from stratavit.dropout_list.joint import check_asked_for
from stratavit.elastic.site import units_named
from stratavit.errors import StrataViTError, described
from stratavit.evaluation.latency import Setting

LIMIT = 1024  # images, as in the paper
Price = Literal["macs", "latency"]


@dataclass(frozen=True)
class Options:
    """How a model is converted, see `convert`."""

    method: Method | None = None
    criterion: Criterion | None = None
    objective: Objective = "auto"
    memory: SumsPlace = "auto"
    axes: ListAxes = "width"
    merging_places: int | None = None
    units: Units | None = None
    price: Price = "macs"
    ignore: Sequence[str] | None = None
    min_width: MinWidth | None = None
    setting: Setting | None = None
    limit: int = LIMIT
    seed: int = 0
    class_map: str | Path | None = None
    weights: str | Path | None = None
    num_classes: int | None = None
    embedding: bool | None = None
    whole_heads: bool = False
    batch_size: int = 64
    workers: int = 0
    device: torch.device | str | None = None

    def check(self) -> None:
        """Checks what can be checked before any work; a `StrataViTError` if a choice is unknown."""
        method, _ = resolve_method(self.method, self.criterion)
        if self.whole_heads and method == "paper":
            raise StrataViTError(
                "method: the paper's cuts inside heads; for whole heads leave the method at its default"
            )
        check_asked_for(self.merging_places, merges=self.axes == "both")
        known_place(self.memory)
        for name, known in (("objective", OBJECTIVES), ("axes", get_args(ListAxes)), ("price", get_args(Price))):
            if getattr(self, name) not in known:
                raise StrataViTError(f"{name}: expected {', '.join(known)}, got {described(getattr(self, name))}")
        if self.units is not None:
            units_named(self.units)
        for name in ("limit", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise StrataViTError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
