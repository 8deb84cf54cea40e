"""The arms of the paper's ablation on scikit-learn's digits: same network, images, epochs and seeds.

    python benchmarks/ablation_digits.py --method default

Each arm continues the same small ViT by `recipes/digits.toml`; top-1 on 360 test images at shares of the MACs. A small
problem on which all arms are quick: it shows the order of the arms, not their distance on real images.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write_results
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import Recipe, SuperNet
from stratavit.tasks import demo

ARMS = ("plain", "channel", "weighted", "layerdrop", "piad")
TWELFTHS = (12, 10, 8, 6, 4)
RECIPE = Path(__file__).parents[1] / "recipes" / "digits.toml"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--method", choices=("default", "paper"), default="default")
    arguments.add_argument("--seeds", type=int, default=2)
    args = arguments.parse_args()
    images, test = demo.digits()
    proxy, held_out = DataLoader(Subset(images, range(256)), 256), DataLoader(test, 360)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ("one-shot", *ARMS)}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = demo.small_vit()
        demo.train(model, images, 10, torch.device("cpu"))
        base = SuperNet(model, demo.DATA_CONFIG).contract(proxy, method=args.method)
        found["one-shot"].append(measure(copy.deepcopy(base).stratify(proxy), held_out) | {"seconds": 0.0})
        for arm in ARMS:
            net, started = copy.deepcopy(base), time.perf_counter()
            recipe = dataclasses.replace(Recipe.read(RECIPE), mode=arm, seed=seed)  # type: ignore[arg-type]
            with tempfile.TemporaryDirectory() as folder:
                stratavit.train_piad(net, images, None, recipe, Path(folder) / "run", proxy=proxy, cpu=True)
            seconds = time.perf_counter() - started
            found[arm].append(measure(net, held_out) | {"seconds": seconds})
            print(arm, seed, found[arm][-1], flush=True)
    rows = [summary(arm, runs) for arm, runs in found.items()]
    note = (
        f"Mean of {args.seeds} seeds, +- half their range. 360 test images: the standard error at 95 % is 1.1 points."
    )
    write_results(f"ablation-digits-{args.method}", rows, note)


def measure(net: SuperNet, loader: Any) -> dict[str, float]:
    """Top-1 at every share."""
    return {f"{n}/12": stratavit.evaluate(net, loader, net.spec(macs=n / 12)).top1 for n in TWELFTHS}


def summary(arm: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and half range over the seeds."""
    row: dict[str, Any] = {"arm": arm}
    for key in runs[0]:
        values = [run[key] for run in runs]
        row[key] = f"{sum(values) / len(values):.1f} +- {(max(values) - min(values)) / 2:.1f}"
    return row


if __name__ == "__main__":
    main()
