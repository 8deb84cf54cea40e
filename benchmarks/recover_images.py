"""Label-free recovery: how does the gain grow with images and with steps, and what do images of another kind cost?

    python benchmarks/recover_images.py --journal FILE [--other FOLDER]

One size of a real model, some seeds of each: different numbers of images at 80 steps, different numbers of steps with
all images, and as many images of another folder. Top-1 is of the validation images. The network is kept in
`benchmarks/work`, and a run that was interrupted goes on from the journal. `plots.py recover-images-MODEL` draws it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import MODELS, WORK, Journal, converted, real_batches, real_model, write_results
from recover import Bench
from torch import Tensor

import stratavit
from stratavit.data.unlabelled import images_in

COUNTS, STEPS = (100, 300, 1000), (20, 80, 160)
USUAL = 80  # steps of runs that differ in their images
LISTS = {"width": "list over width", "both": "list over width and tokens"}
KEY = ("images of", "images", "steps", "seed")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--model", choices=MODELS, default="deit_tiny")
    add("--twelfths", type=int, default=4, metavar="N", help="size (default: %(default)s)")
    add("--axes", choices=("width", "both"), default="both", help="list that the size is of")
    add("--counts", type=int, nargs="*", default=COUNTS, metavar="N", help="images to learn from")
    add("--steps", type=int, nargs="*", default=STEPS, metavar="N", help="of runs on all images")
    add("--other", type=Path, help="folder of images of another kind; as many are taken as there are of the usual")
    add("--seeds", type=int, default=3)
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    add("--validation", type=int, help="validation images (default: all)")
    add("--journal", type=Path, required=True, help="file with a line for each run")
    args = arguments.parse_args()
    net, model = converted(args.model, WORK, axes=("width", "tokens")), real_model(args.model)
    kinds = {"imagenet": torch.cat([one for one, _ in real_batches(model, "train", 1000)])}
    most = len(kinds["imagenet"])
    cases = [("imagenet", count, USUAL) for count in args.counts] + [("imagenet", most, steps) for steps in args.steps]
    if args.other is not None:
        kinds[args.other.name] = images_in(args.other, net.model, net.data_config, most).float()
        cases.append((args.other.name, most, USUAL))
    bench, journal = Bench(args, net, [], real_batches(model, "val", args.validation)), Journal(args.journal, *KEY)
    before = bench.hits(net.extract(macs=args.twelfths / 12, axes=args.axes, verbose=False))
    for seed in range(args.seeds):
        for case in dict.fromkeys(cases):
            found = dict(zip(KEY, (*case, seed), strict=True))
            if found not in journal:
                journal.add(found | one_run(bench, kinds[case[0]], case, seed))
    rows = [summary(list(journal.rows.values()), case, before) for case in dict.fromkeys(cases)]
    dense, cut = (100 * float(hits.mean()) for hits in (bench.hits(net), before))
    note = (
        f"{args.model} at {args.twelfths}/12 of the MACs ({LISTS[args.axes]}), dense {dense:.1f}, one-shot {cut:.1f}: "
        f"top-1 on {len(before)} validation images, mean over {args.seeds} seeds; `sd` is that between seeds. "
        f"A tenth of the images is held back. `divergence`: KL from the source there, nats. Device: {bench.device}."
    )
    write_results(f"recover-images-{args.model}", rows, note)


def one_run(bench: Bench, images: Tensor, case: tuple[str, int, int], seed: int) -> dict[str, Any]:
    """One recovery on evenly spread images, as a line of the journal."""
    _, count, steps = case
    small = bench.net.extract(macs=bench.args.twelfths / 12, axes=bench.args.axes, verbose=False)
    chosen = images[[index * len(images) // count for index in range(count)]]
    stratavit.recover(small, list(chosen.split(50)), bench.net, steps=steps, config=bench.keys | {"seed": seed})
    facts = small.provenance["recover"]
    return {
        "top1": 100 * float(bench.hits(small).mean()),
        "divergence before": facts["before"]["divergence"],
        "divergence": facts["divergence"],
    }


def summary(runs: list[dict[str, Any]], case: tuple[str, int, int], before: Tensor) -> dict[str, Any]:
    """A row of the table: the mean over seeds."""
    own = [run for run in runs if tuple(run[name] for name in KEY[:3]) == case]
    top1 = [run["top1"] for run in own]
    mean = statistics.mean(top1)
    return dict(zip(KEY, case, strict=False)) | {
        "one-shot": round(100 * float(before.mean()), 1),
        "recovered": round(mean, 1),
        "gain": round(mean - 100 * float(before.mean()), 1),
        "sd": round(statistics.stdev(top1), 1) if len(top1) > 1 else "",
        "divergence before": round(statistics.mean(run["divergence before"] for run in own), 3),
        "divergence": round(statistics.mean(run["divergence"] for run in own), 3),
    }


if __name__ == "__main__":
    main()
