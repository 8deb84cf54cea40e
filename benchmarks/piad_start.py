"""PIAD started from the default's coordinates against PIAD started from plain WPAC: equal epochs, digits.

    python benchmarks/piad_start.py [--seeds 3]

Both train by `recipes/digits.toml` with cut channels replaced by their mean; only the order of the channels differs.
Top-1 on 360 test images, before (one-shot, means only) and after training.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path

import torch
from ablation_digits import RECIPE, measure, summary
from common import write_results
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import Recipe, SuperNet
from stratavit.tasks import demo


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    args = arguments.parse_args()
    images, test = demo.digits()
    proxy, held_out = DataLoader(Subset(images, range(256)), 256), DataLoader(test, 360)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = demo.small_vit()
        demo.train(model, images, 10, torch.device("cpu"))
        for start in ("wpac", "output"):
            net = SuperNet(model, demo.DATA_CONFIG).contract(proxy, criterion=start)  # type: ignore[arg-type]
            net.method, net.compensation = "default", "mean"
            before = measure(copy.deepcopy(net).stratify(proxy), held_out)
            recipe = dataclasses.replace(Recipe.read(RECIPE), seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                stratavit.train_piad(net, images, None, recipe, Path(folder) / "run", proxy=proxy, cpu=True)
            for name, values in ((f"{start}, one-shot", before), (f"{start}, PIAD", measure(net, held_out))):
                found.setdefault(name, []).append(values)
                print(name, seed, values, flush=True)
    rows = [summary(name, runs) for name, runs in sorted(found.items())]
    note = (
        f"Mean of {args.seeds} seeds, +- half their range. 360 test images: the standard error at 95 % is 1.1 points."
    )
    write_results("piad-start-digits", rows, note)


if __name__ == "__main__":
    main()
