"""Label-free recovery with few images: should all weights learn, only biases and norms, or a low rank of every matrix?

    python benchmarks/recover_weights.py --journal FILE

One size of a real model; loss, augmentation and schedule of `stratavit recover`, in one loop for all three, without
images held back. Low rank: of every linear layer of a block ``W + B A``, B zero at first, and biases and norms. Top-1
is of the validation images after the last step. A run that was interrupted goes on from the journal.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from common import MODELS, WORK, Batches, Journal, converted, real_batches, real_model, write_results
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stratavit.models.architecture import resolve_data_config
from stratavit.training.imitation import Following, Imitation
from stratavit.training.optimizer import rate_scale
from stratavit.training.recipe import RECOVERY, Recipe
from stratavit.training.tracing import trace
from stratavit.utils.model import classes_of

KEY = ("learns", "rate", "images", "seed")
BATCH = 32
CASES = (("all", 1.0), ("bias+norm", 1.0), ("bias+norm", 3.0), ("rank 8", 1.0), ("rank 8", 3.0), ("rank 32", 1.0))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--model", choices=MODELS, default="deit_tiny")
    add("--twelfths", type=int, default=6, metavar="N", help="size (default: %(default)s)")
    add("--counts", type=int, nargs="*", default=[100], metavar="N", help="images to learn from")
    add("--steps", type=int, default=80)
    add("--seeds", type=int, default=2)
    add("--journal", type=Path, required=True, help="file with a line for each run")
    args = arguments.parse_args()
    net, model = converted(args.model, WORK, axes=("width", "tokens")), real_model(args.model)
    images = torch.cat([one for one, _ in real_batches(model, "train", 1000)])
    validation, journal = real_batches(model, "val"), Journal(args.journal, *KEY)
    cut = net.extract(macs=args.twelfths / 12, axes="width", verbose=False)
    before, dense = top1(cut, validation), top1(net, validation)
    for seed, count, (learns, rate) in itertools.product(range(args.seeds), args.counts, CASES):
        found = dict(zip(KEY, (learns, rate, count, seed), strict=True))
        if found not in journal:
            torch.manual_seed(seed)
            small = net.extract(macs=args.twelfths / 12, axes="width", verbose=False)
            chosen = images[[index * len(images) // count for index in range(count)]]
            learn(small, net.source_copy(), chosen, learns, rate, args.steps)
            journal.add(found | {"top1": top1(small, validation)})
    rows = [summary(list(journal.rows.values()), *case) for case in itertools.product(args.counts, CASES)]
    note = (
        f"{args.model} at {args.twelfths}/12 of the MACs, dense {dense:.1f}, one-shot {before:.1f}: top-1 on the "
        f"validation images after {args.steps} steps of {BATCH}, mean over {args.seeds} seeds. `rate`: multiple of the "
        "recipe's; of factors of low rank it is a share of the size of the matrix."
    )
    write_results(f"recover-weights-{args.model}", rows, note)


class LowRank(nn.Module):
    """``W + B A``, W ``[out, in]`` as it was."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        return weight + self.b @ self.a


def groups_of(model: Any, learns: str, rate: float, recipe: Recipe) -> list[dict[str, Any]]:
    """What learns of a model, each tensor with its rate."""
    base = rate * recipe.rate(BATCH)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": [one], "lr": base * rate_scale(one, recipe)} for one in vectors]
    if learns == "all":
        return groups + [{"params": [one], "lr": base * rate_scale(one, recipe)} for one in matrices]
    for one in matrices:
        one.requires_grad_(False)
    if learns.startswith("rank"):
        for layer in [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]:
            scale = rate_scale(layer.weight, recipe)
            low = LowRank(layer.weight, int(learns.split()[1]))
            parametrize.register_parametrization(layer, "weight", low)
            size = layer.weight.shape[1] ** 0.5  # of a sum over inputs: a step changes W by about the same as above
            groups += [{"params": [low.b], "lr": base * scale * size}, {"params": [low.a], "lr": base / size}]
    return groups


def learn(model: Any, teacher: nn.Module, images: Tensor, learns: str, rate: float, steps: int) -> None:
    """Trains the weights in place."""
    recipe = Recipe.from_dict(RECOVERY)
    optimiser = torch.optim.AdamW(groups_of(model, learns, rate, recipe), weight_decay=0.0)
    highest = [group["lr"] for group in optimiser.param_groups]
    imitation = Imitation(resolve_data_config(teacher), recipe, classes_of(teacher))
    target = Following(imitation, recipe.distil_blocks, tokens=1.0)
    order: list[int] = []
    for step in range(steps):
        share = min(1.0, (step + 1) / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimiser.param_groups, highest, strict=True):
            group["lr"] = share * rate
        while len(order) < BATCH:
            order += torch.randperm(len(images)).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        batch, labels = target.mix(images[chosen], torch.zeros(BATCH, dtype=torch.long))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = target.taught(labels, trace(teacher, batch), 1.0)
            loss = target.loss(trace(model, batch), wanted)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@torch.inference_mode()
def top1(model: nn.Module, validation: Batches) -> float:
    """Percent of images whose class is the first answer."""
    hits = [model(images).argmax(dim=-1) == labels for images, labels in validation]
    return 100 * float(torch.cat(hits).float().mean())


def summary(rows: list[dict[str, Any]], count: int, case: tuple[str, float]) -> dict[str, Any]:
    """A line of the table: all seeds of a case."""
    found = [row["top1"] for row in rows if (row["learns"], row["rate"], row["images"]) == (*case, count)]
    each = ", ".join(f"{one:.1f}" for one in found)
    return {"learns": case[0], "rate": case[1], "images": count, "top-1": f"{statistics.mean(found):.1f}", "each": each}


if __name__ == "__main__":
    main()
