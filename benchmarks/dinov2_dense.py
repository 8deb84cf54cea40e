"""DINOv2 ViT-S/14 as a backbone that returns all its tokens, without training: what its maps are worth when it is cut.

    python benchmarks/dinov2_dense.py --onnx FILE [--size 224] [--calibration 300] [--bank 1000] [--queries 433]

FILE: see `dinov2_knn.py`. Images of the development data, one of each class in the bank; features are the mean of the
patches. Nearest neighbour, and a linear probe (one ridge regression): both in percent of the queries, with the relative
squared error of the maps beside them. The paper's method and the default one, both calibrated for the maps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Batches, real_batches, write_results
from dinov2_knn import dinov2
from torch import Tensor, nn

import stratavit
from stratavit.evaluation.probe import fitted, scores_of

TWELFTHS = (10, 8, 6)
RIDGE = 0.1  # with one image of a class none is left to choose by
ROWS = {"paper": "the paper", "default": "default"}
Found = dict[str, Tensor]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--onnx", type=Path, required=True, help="file that holds the weights")
    arguments.add_argument("--size", type=int, default=224)
    arguments.add_argument("--calibration", type=int, default=300, help="images")
    arguments.add_argument("--bank", type=int, default=1000, help="training images")
    arguments.add_argument("--queries", type=int, default=433, help="validation images")
    arguments.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS))
    args = arguments.parse_args()
    model = backbone(args.onnx, args.size)
    bank, queries = real_batches(model, "train", args.bank, 25), real_batches(model, "val", args.queries, 25)
    calibration = bank[: -(-args.calibration // 25)]
    dense = {"bank": seen(model, bank), "queries": seen(model, queries)}
    rows: list[dict[str, Any]] = []

    def add(method: str, size: int, known: Found, found: Found, seconds: int | str) -> None:
        share = {"method": method, "size": f"{size}/12"}
        rows.append(share | worth(known, found, dense["queries"]["maps"]) | {"seconds to convert": seconds})
        print(json.dumps(rows[-1]), flush=True)

    add("dense", 12, dense["bank"], dense["queries"], "")
    for method in args.methods:
        started = time.perf_counter()
        net = stratavit.SuperNet(model).contract(calibration, method=method).stratify(calibration)
        seconds = round(time.perf_counter() - started)
        for twelfths in TWELFTHS:
            small = net.extract(macs=twelfths / 12, axes="width", verbose=False)
            add(ROWS[method], twelfths, seen(small, bank), seen(small, queries), seconds)
    known, tested = (sum(len(labels) for _, labels in batches) for batches in (bank, queries))
    note = (
        f"DINOv2 ViT-S/14, {args.size} px, all tokens. Nearest neighbour of {known} images, one of each class, "
        f"and a ridge regression on them ({RIDGE} of the mean variance of a feature): top-1 in percent on "
        f"{tested} validation images, the standard error is about 2. Error: of the maps of these images against "
        f"the dense model's, relative and squared. Converted with {len(calibration) * 25} images, without labels."
    )
    write_results(f"dinov2-dense-{args.size}px", rows, note)


def backbone(path: Path, size: int) -> nn.Module:
    """The model that returns class token and patches, ``[B, 1 + N, C]``."""
    model: Any = dinov2(path, size)
    model.reset_classifier(0, "")
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def seen(model: nn.Module, batches: Batches) -> Found:
    """Features ``[n, C]`` of unit length, labels, and all maps ``[n, 1 + N, C]`` in float16."""
    maps, features = [], []
    for images, _ in batches:
        found = model(images)
        maps.append(found.half())
        features.append(F.normalize(found[:, 1:].mean(dim=1), dim=-1))
    return {"maps": torch.cat(maps), "features": torch.cat(features), "labels": torch.cat([y for _, y in batches])}


def worth(bank: Found, queries: Found, dense: Tensor) -> dict[str, float]:
    """The three figures, against the dense model's maps ``[n, 1 + N, C]``."""
    nearest = bank["labels"][(queries["features"] @ bank["features"].T).argmax(dim=1)]
    weights = fitted(bank["features"], bank["labels"], torch.zeros(len(bank["labels"]), dtype=torch.bool), RIDGE)
    probed = scores_of(queries["features"], weights).argmax(dim=1)
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(queries["maps"], dense, strict=True))
    return {
        "neighbour": round(100 * float((nearest == queries["labels"]).float().mean()), 1),
        "probe": round(100 * float((probed == queries["labels"]).float().mean()), 1),
        "error": round(error / sum(float(one.float().square().sum()) for one in dense), 4),
    }


if __name__ == "__main__":
    main()
