"""Few calibration images: how good is the list, and would fewer steps do?

    python benchmarks/few_images.py --model deit_tiny

For each number of images two draws, without labels. `all` are the steps of `stratify`, `few` fewer of them, in
proportion to the images and at least one at each size. Divergence from the dense model and top-1 are over the
validation images, means of the draws.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys

import torch
import torch.nn.functional as F
from common import MODELS, Batches, real_batches, real_model, timed, write_results

import stratavit

COUNTS = (16, 64, 200)
DRAWS = 2
TWELFTHS = (8, 6, 4)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    args = arguments.parse_args()
    model = real_model(args.model)
    images = torch.cat([batch for batch, _ in real_batches(model, "train")])
    validation = real_batches(model, "val")
    with torch.inference_mode():
        dense = [model(batch) for batch, _ in validation]
    rows = []
    for count in COUNTS:
        found: dict[str, list[list[float]]] = {"few": [], "all": []}
        for draw in range(DRAWS):
            chosen = [(index * len(images) // count + 7 * draw) % len(images) for index in range(count)]
            batches = list(images[chosen].split(32))
            contracted = stratavit.SuperNet(model).contract(batches)
            for name, plan in (("few", few_steps(count)), ("all", stratavit.Walk())):
                net = copy.deepcopy(contracted)
                seconds = timed(lambda net=net, plan=plan: net.stratify(batches, plan=plan))  # noqa: B023
                found[name].append([seconds, *quality(net, validation, dense)])
                print(count, name, found[name][-1], file=sys.stderr, flush=True)
        for name, draws in found.items():
            seconds, *figures = (sum(column) / DRAWS for column in zip(*draws, strict=True))
            row = {"images": count, "steps": name, "seconds of the list": round(seconds, 1)}
            for place, twelfth in enumerate(TWELFTHS):
                row[f"divergence {twelfth}/12"] = round(figures[2 * place], 3)
                row[f"top-1 {twelfth}/12"] = round(figures[2 * place + 1], 1)
            rows.append(row)
    note = f"{sum(len(labels) for _, labels in validation)} validation images, means of {DRAWS} draws, nothing trained."
    write_results(f"few-images-{args.model}", rows, note)


def few_steps(images: int) -> stratavit.Walk:
    """Steps in proportion to the images, all of them from 500 on."""
    share = min(1.0, images / 500)
    return stratavit.Walk(tuple((size, math.ceil(steps * share)) for size, steps in stratavit.Walk().states))


@torch.inference_mode()
def quality(net: stratavit.SuperNet, batches: Batches, dense: list[torch.Tensor]) -> list[float]:
    """Mean divergence from the dense model, nats, and top-1 in percent, at each size."""
    found = []
    for twelfth in TWELFTHS:
        small = net.extract(macs=twelfth / 12, verbose=False)
        outputs = [small(images) for images, _ in batches]
        count = sum(map(len, outputs))
        pairs = zip(outputs, dense, strict=True)
        divergence = sum(
            float(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum"))
            for ours, theirs in pairs
        )
        right = sum(int((ours.argmax(-1) == labels).sum()) for ours, (_, labels) in zip(outputs, batches, strict=True))
        found += [divergence / count, 100 * right / count]
    return found


if __name__ == "__main__":
    main()
