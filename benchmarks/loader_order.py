"""Does the order of the loader matter? DeiT-Tiny on real weights, images in order and shuffled anew at every pass.

    python benchmarks/loader_order.py [--model deit_tiny] [--images 1000]

The same images are given to `contract` and `stratify` in the folder's order in batches of 64, and by a shuffling
DataLoader in batches of 48. Counts the entries in which the two dropout lists differ, and measures top-1 of both.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import MODELS, Batches, real_batches, real_model, write_results
from torch.utils.data import DataLoader, TensorDataset

import stratavit

TWELFTHS = (10, 8, 6, 4)


def shuffling(batches: Batches) -> DataLoader[Any]:
    """The same images, in another order at every pass."""
    images, labels = (torch.cat(side) for side in zip(*batches, strict=True))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(images, labels), 48, shuffle=True, generator=generator)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--images", type=int, default=1000, help="calibration images (default: %(default)s)")
    args = arguments.parse_args()
    model = real_model(args.model)
    calibration, validation = real_batches(model, "train", args.images), real_batches(model, "val")
    rows, lists = [], []
    for title, loader in (("in order", calibration), ("shuffled at every pass", shuffling(calibration))):
        net = stratavit.SuperNet(model).contract(loader).stratify(loader)
        assert net.strata is not None
        lists.append(net.strata.entries)
        found = {f"{n}/12": stratavit.evaluate(net, validation, net.spec(macs=n / 12)).top1 for n in TWELFTHS}
        rows.append({"loader": title} | found)
    differ = sum(a != b for a, b in zip(*lists, strict=False)) + abs(len(lists[0]) - len(lists[1]))
    note = f"{args.images} images for calibration, {sum(len(y) for _, y in validation)} for validation. Of the "
    note += f"{len(lists[0])} entries of the two lists, {differ} differ."
    write_results(f"loader-order-{args.model}", rows, note)


if __name__ == "__main__":
    main()
