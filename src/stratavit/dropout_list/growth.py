"""What a bypass may be measured by (`sensitivity.bypass_sensitivity`)."""

from __future__ import annotations

from typing import Literal

Measure = Literal["auto", "top1", "cost"]
