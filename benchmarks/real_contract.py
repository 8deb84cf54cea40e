"""The contract of the tests on real weights: DeiT-Tiny, ViT-Tiny (AugReg), and DINOv2 ViT-S/14 where its file is given.

    python benchmarks/real_contract.py [--onnx FILE] [--images 64] [--axes both]

Function kept by contraction; extracted = elastic; MACs and parameters exact; budgets within a unit; saved = loaded, bit
for bit; ONNX and torch.export answer alike; an image's answer does not depend on its batch. Calibrated on training
images, compared on validation images. FILE: see `dinov2_knn.py`. `--axes both`: sizes that merge tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import MODELS, Batches, real_batches, real_model, write_results
from dinov2_knn import dinov2
from torch import Tensor, nn

import stratavit
from stratavit.interop.export import SUFFIXES
from stratavit.models.cost import linear_macs

SHARES = (10 / 12, 8 / 12, 6 / 12)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--onnx", type=Path, help="file that holds DINOv2's weights")
    arguments.add_argument("--images", type=int, default=64, help="to calibrate on")
    arguments.add_argument("--axes", choices=("width", "both"), default="width")
    args = arguments.parse_args()
    models = {name: real_model(name) for name in MODELS}
    if args.onnx:
        models["dinov2_small"] = dinov2(args.onnx, 112)
    rows = []
    for name, model in models.items():
        rows.append({"model": name} | checked(model, real_batches(model, "train", args.images), args.axes))
        print(rows[-1], flush=True)
    note = (
        f"Calibrated on {args.images} images; largest differences on 8 validation images, the first two over the "
        "largest answer. Sizes: 10/12, 8/12 and 6/12 of the MACs. A unit is the dearest of the list."
    )
    write_results("real-contract" if args.axes == "width" else "real-contract-tokens", rows, note)


@torch.inference_mode()
def checked(model: nn.Module, calibration: Batches, axes: str) -> dict[str, Any]:
    """The worst of each part of the contract."""
    images = real_batches(model, "val", 8)[0][0]
    with torch.inference_mode(False):
        options = {"axes": ("width", "tokens")} if axes == "both" else {}
        net = stratavit.SuperNet(model).contract(calibration).stratify(calibration, **options).eval()
    source, full = model(images), net(images)
    largest = float(source.abs().max())
    strata = net.joint_strata if axes == "both" else net.strata
    assert strata is not None
    costs = [net.macs(strata.spec(position)) for position in range(len(strata) + 1)]
    unit = max(a - b for a, b in pairwise(costs))
    worst: dict[str, Any] = {"contracted - source": gap(full, source) / largest}
    for share in SHARES:
        met = net.budget(macs=share, axes=axes)
        small = net.extract(spec=met.spec, verbose=False)
        answer = small(images)
        assert linear_macs(small, net.data_config["input_size"]) == net.macs(met.spec)
        assert sum(parameter.numel() for parameter in small.parameters()) == net.params(met.spec)
        found = {
            "extracted - elastic": gap(answer, net(images, met.spec)) / largest,
            "gap to the budget, units": (share * net.macs() - met.got) / unit,
            "loaded - saved": gap(reloaded(small)(images), answer),
            "ONNX - eager": exported(small, images, "onnx"),
            ".pt2 - eager": exported(small, images, "torch"),
            "alone - in a batch": gap(small(images[:1]), answer[:1]) / largest,
        }
        worst |= {what: max(value, worst.get(what, 0.0)) for what, value in found.items()}
    return worst | {"MACs, parameters": "exact"}


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def reloaded(small: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        stratavit.save(small, Path(folder) / "small")
        return stratavit.load(Path(folder) / "small")


def exported(small: nn.Module, images: Tensor, kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        file = Path(folder) / f"small{SUFFIXES[kind]}"
        return stratavit.export(small, file, kind, images=images.clone()).difference


if __name__ == "__main__":
    main()
