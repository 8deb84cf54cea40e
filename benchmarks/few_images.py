"""Few calibration images: is a list of few steps worse than one of all steps, and how long does one call take?

    python benchmarks/few_images.py --model deit_tiny

For each number of images two draws, without labels. `few` is what `stratify` does by default, `all` its plan for many
images. Divergence from the dense model and top-1 are over the validation images, means of the draws. The last row is
`stratavit.compress` on a flat folder of 64 images, to half of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from common import DATA, MODELS, Batches, real_batches, real_model, timed, write_results
from torch import nn

import stratavit
from stratavit.data.image_files import all_images

COUNTS = (16, 64, 200)
DRAWS = 2
TWELFTHS = (8, 6, 4)
FOLDER = 64


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
            for name, plan in (("few", None), ("all", stratavit.Walk())):
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
    seconds = compressed(model)
    note = f"`stratavit.compress(model, folder, macs=0.5)`, flat folder of {FOLDER} images: {seconds:.0f} s."
    write_results(f"few-images-{args.model}", rows, note)


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


def compressed(model: nn.Module) -> float:
    """Seconds of one call on a flat folder of links to images."""
    paths = [path for path, _ in all_images(DATA / "imagenet" / "train").samples]
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths[:: len(paths) // FOLDER][:FOLDER]):
            Path(folder, f"{number}{Path(path).suffix}").symlink_to(Path(path).resolve())
        return timed(lambda: stratavit.compress(model, folder, macs=0.5))


if __name__ == "__main__":
    main()
