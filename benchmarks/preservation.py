"""Contraction keeps the function, in half precision too: logits over 64 real images.

    python benchmarks/preservation.py

For half precision, what rounding does to the source model itself is the yardstick, for the contracted
model and for a sub-network of half the widths.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import MODELS, real_batches, real_model, write_results
from torch import Tensor, nn

import stratavit


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        model = real_model(name)
        images = torch.cat([x for x, _ in real_batches(model, "val", limit=64)])
        calibration = real_batches(model, "train", limit=256)
        for method in ("paper", "default"):
            net = stratavit.SuperNet(model).contract(calibration, method=method)  # type: ignore[arg-type]
            half = net.extract(spec={site.name: site.width // 2 for site in net.sites})
            whole = net.extract(spec={})
            source = answers(model, images)
            row = {"model": name, "method": method, "float32: contracted - source": gap(answers(whole, images), source)}
            for dtype in (torch.bfloat16, torch.float16):
                short = str(dtype).removeprefix("torch.")
                for what, judged in (("source", model), ("contracted", whole), ("half size", half)):
                    rounded = answers(copy.deepcopy(judged).to(dtype), images)
                    row[f"{short}: {what} - its float32"] = gap(rounded, answers(judged, images))
            row["largest logit"] = float(source.abs().max())
            rows.append(row)
            print(row, flush=True)
    write_results("preservation", rows, "Largest differences; 64 validation images, calibrated on 256 training images.")


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in the model's own precision, as float32."""
    dtype = next(model.parameters()).dtype
    return torch.cat([model(batch.to(dtype)).float() for batch in images.split(32)])


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference."""
    return float((one - other).abs().max())


if __name__ == "__main__":
    main()
