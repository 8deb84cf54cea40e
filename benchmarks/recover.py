"""Label-free recovery: how much of what cutting costs comes back, on how many images, in which time?

    python benchmarks/recover.py [--twelfths 8 6 4] [--all] [--minutes M | --steps N]

One small model at each of the given twelfths of the MACs, and with `--all` all sizes of the super-network at once.
Learns from up to 1,000 calibration images without labels; top-1 is of the 433 validation images, next to the one-shot
networks', with the paired difference. The source is the teacher. The network is kept in `benchmarks/work`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MODELS, WORK, Batches, converted, real_batches, real_model, write_results
from torch import Tensor

import stratavit
from stratavit.training.recipe import Recipe, field_types

TWELFTHS = (12, 10, 8, 6, 4)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--model", choices=MODELS, default="deit_tiny")
    add("--twelfths", type=int, nargs="*", default=[], metavar="N", help="sizes to recover on their own")
    add("--all", action="store_true", help="recover all sizes at once")
    add("--minutes", type=float, help="of each recovery")
    add("--steps", type=int, help="of each recovery")
    add("--images", type=int, default=1000, help="images to learn from (default: %(default)s)")
    add("--validation", type=int, help="validation images (default: all)")
    add("--axes", choices=("width", "both"), default="width", help="both: sizes of the list over width and tokens")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    add("--out", type=Path, help="folder that the runs are kept in")
    add("--name", default="", help="end of the names of the result files")
    args = arguments.parse_args()
    options = {"axes": ("width", "tokens")} if args.axes == "both" else {}
    net, images = converted(args.model, WORK, **options), real_batches(real_model(args.model), "train", args.images)
    bench = Bench(args, net, images, real_batches(real_model(args.model), "val", args.validation))
    rows = [bench.one_size(twelfths) for twelfths in args.twelfths]
    rows += bench.all_sizes() if args.all else []
    dense = bench.hits(net)
    note = (
        f"Top-1 of {args.model} on {len(dense)} validation images, dense {100 * float(dense.mean()):.1f}; "
        f"{sum(len(one) for one, _ in images)} images to learn from, a tenth of them held back. `gain`: paired "
        "difference, points, +- one standard error. `divergence`: KL from the source on the images held back, nats. "
        f"Seconds: wall clock of the whole call. Device: {bench.device}."
    )
    name = "-".join(filter(None, [f"recover-{args.model}", args.name]))
    write_results(name, rows, note)
    if args.all and args.out:
        write_results(f"{name}-curve", curve(args.out / "all"), "On the images held back; percent, and nats.")


def curve(run: Path) -> list[dict[str, Any]]:
    """What the log of a run says of the images held back, over its minutes."""
    rows, minutes = [], 0.0
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if found["kind"] == "epoch":
            minutes += found["seconds"] / 60
            agreements = {key: value for key, value in found.items() if key.startswith("agreement at")}
            rows.append({"minutes": round(minutes, 1), "steps": found["step"], "divergence": found["divergence"]})
            rows[-1] |= agreements
    return rows


class Bench:
    """What all recoveries of a call share."""

    def __init__(self, args: argparse.Namespace, net: stratavit.SuperNet, images: Batches, validation: Batches) -> None:
        self.args, self.net, self.images, self.validation = args, net, [one for one, _ in images], validation
        self.keys = recipe_keys(args.set)
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"

    @torch.inference_mode()
    def hits(self, run: Callable[..., Tensor], *spec: Any) -> Tensor:
        """1 for each validation image whose class is the first answer, else 0."""
        device = next(run.parameters()).device  # type: ignore[attr-defined]
        parts = [run(x.to(device), *spec).argmax(dim=-1).cpu() == y for x, y in self.validation]
        return torch.cat(parts).float()

    def recovered(self, model: Any, name: str) -> dict[str, Any]:
        """Recovers a network in place; steps, seconds and agreement for its row."""
        out, started = None if self.args.out is None else self.args.out / name, time.perf_counter()
        length = {"minutes": self.args.minutes, "steps": self.args.steps}
        stratavit.recover(model, self.images, self.net, **length, config=self.keys, out=out)
        facts = model.provenance["recover"]
        recipe = Recipe(**facts["recipe"])
        return {
            "steps": facts["steps"],
            "batch": recipe.batch_size,
            "lr": f"{recipe.rate(recipe.batch_size * recipe.accumulate):.3g}",
            "seconds": round(time.perf_counter() - started),
            "divergence": f"{facts['before']['divergence']:.3f} to {facts['divergence']:.3f}",
        }

    def one_size(self, twelfths: int) -> dict[str, Any]:
        """One small model."""
        small = self.net.extract(macs=twelfths / 12, axes=self.args.axes, verbose=False)
        before = self.hits(small)
        facts = self.recovered(small, f"{twelfths}")
        return row(f"{twelfths}/12 alone", before, self.hits(small), facts)

    def all_sizes(self) -> list[dict[str, Any]]:
        """The super-network, a row for each size."""
        net = copy.deepcopy(self.net)
        if self.args.axes == "width":
            net.joint_strata = None  # a kept network may have one, too
        specs = {n: net.spec(macs=n / 12, axes=self.args.axes) for n in TWELFTHS}
        before = {n: self.hits(net, spec) for n, spec in specs.items()}
        facts = self.recovered(net, "all")
        return [row(f"{n}/12 of all", before[n], self.hits(net, spec), facts) for n, spec in specs.items()]


def recipe_keys(pairs: Sequence[str]) -> dict[str, Any]:
    """Keys of a recipe from texts ``KEY=VALUE``."""
    kinds = field_types()
    found = dict(text.split("=", 1) for text in pairs)
    return {key: kinds[key](value) if kinds[key] in (int, float) else value for key, value in found.items()}


def row(what: str, before: Tensor, after: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    difference = 100 * (after - before)
    gain = f"{float(difference.mean()):+.1f} +- {float(difference.std()) / len(difference) ** 0.5:.1f}"
    found = {
        "what": what,
        "one-shot": round(100 * float(before.mean()), 1),
        "recovered": round(100 * float(after.mean()), 1),
        "gain": gain,
        **facts,
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
