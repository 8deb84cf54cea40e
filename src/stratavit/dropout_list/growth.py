"""How a dropout list grows while a network trains (method section 2, progressive list)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stratavit.calibration.objectives import Objective

Measure = Literal["auto", "top1", "cost"]


@dataclass(frozen=True)
class Growth:
    """How the list grows.

    Attributes:
        reduction: r, share of the dense MACs that the finished list drops (paper: 0.875).
        stages: P_e, times that it grows until it is finished (paper: 50, once per epoch).
        objective: What the Taylor importance differentiates, see `statistics.collect`.
        measure: What a bypass costs, see `sensitivity.bypass_sensitivity` (paper: ``top1``).
    """

    reduction: float = 0.875
    stages: int = 50
    objective: Objective = "auto"
    measure: Measure = "auto"

    def target(self, dense: int, stage: int) -> float:
        """MACs that the list must drop from stage `stage` (0 is the first) on: ``r * dense * (stage + 1) / P_e``."""
        return self.reduction * dense * min(stage + 1, self.stages) / self.stages
