"""Would a walk, unit by unit, choose tokens and widths better than the search at five sizes?

    python benchmarks/token_walk.py [--model deit_tiny]

The walk begins at the dense model. At every step a unit of tokens leaves at one of the places, or some of the width
list: whichever costs least divergence per MAC, measured at the network that is already cut, on the images and with the
compensation that the search has. Both lists at the same shares of the MACs: divergence on the calibration images that
were measured with, and top-1 on the validation images.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from common import MODELS, WORK, converted, real_batches, real_model, write_results

import stratavit
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.data.feed import Feed
from stratavit.dropout_list.joint import Search, TokenSearch, chosen_places
from stratavit.dropout_list.marginal_effects import Reference, crossed
from stratavit.elastic.running import Run, running
from stratavit.elastic.tokens import token_counts
from stratavit.utils.model import eval_mode, frozen

TWELFTHS = (10, 8, 6, 4, 3)
TOKENS, WIDTH = 8, 0.02  # a unit: tokens of a place; share of the dense model's MACs of the width list


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    args = arguments.parse_args()
    model, kept = real_model(args.model), converted(args.model, WORK, axes=("width", "tokens"))
    images, validation = real_batches(model, "train", 1000), real_batches(model, "val")
    net = stratavit.SuperNet(model).contract(images)
    net.strata, net.joint_strata = kept.strata, kept.joint_strata
    assert net.strata is not None
    tokens = TokenSearch()
    places = chosen_places([place for place in net.cost.places if place.may_merge], tokens.places)
    with eval_mode(net.model), frozen(net.model), crossed(net.model, 0):
        reference = Reference(net.model, net.sites, Feed(images, net.model).take(tokens.images, 0), DenseOutputs())

        def distance(spec: Mapping[str, int]) -> float:
            with running(Run(tokens=token_counts(net.model, net.cost.places, spec))):
                return reference.distance(spec)

        search = Search(net.cost, places, net.strata, distance)
        walked = dict(at_twelfths(walk(search), search))
        lists = {
            "walk": walked,
            "search at five sizes": {n: dict(net.spec(macs=n / 12, axes="both")) for n in TWELFTHS},
        }
        divergences = {name: {n: distance(spec) for n, spec in specs.items()} for name, specs in lists.items()}
    rows = []
    for name, specs in lists.items():
        row: dict[str, object] = {"list": name}
        for n in TWELFTHS:
            spec = net.resolve(specs[n])
            row[f"{n}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1)
            row[f"KL {n}/12"] = round(divergences[name][n], 4)
            row[f"share {n}/12"] = round(net.macs(spec) / net.macs(), 3)
            row[f"tokens {n}/12"] = " ".join(f"{k.split('.')[1]}:{v}" for k, v in specs[n].items() if "tokens" in k)
        rows.append(row)
        print(row, flush=True)
    note = (
        f"KL in nats on the {tokens.images} calibration images that both were measured with; top-1 on "
        f"{sum(len(labels) for _, labels in validation)} validation images. Units of the walk: {TOKENS} tokens of a "
        f"place, or {WIDTH:.0%} of the MACs of the width list."
    )
    write_results(f"token-walk-{args.model}", rows, note)


def walk(search: Search) -> Iterator[dict[str, int]]:
    """Specs of a network that loses, at every step, what costs least per MAC."""
    counts, position, before = tuple(place.width for place in search.places), 0, 0.0
    while True:
        spec = listed(search, counts, position)
        yield spec
        found = []
        macs = search.cost.macs(spec)
        for new, at in units(search, counts, position):
            cut = listed(search, new, at)
            saved = macs - search.cost.macs(cut)
            if saved > 0:
                divergence = search.distance(cut)
                found.append(((divergence - before) / saved, divergence, new, at))
        if not found:
            return
        _, before, counts, position = min(found)


def listed(search: Search, counts: tuple[int, ...], position: int) -> dict[str, int]:
    """Tokens, and the widths at a position of the width list."""
    tokens = {place.name: count for place, count in zip(search.places, counts, strict=True)}
    return {**search.widths.spec(position), **tokens}


def units(search: Search, counts: tuple[int, ...], position: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """What may leave next: tokens of each place (the places behind it have no more), or some of the width list."""
    for index in range(len(counts)):
        cut = tuple(min(n, counts[index] - TOKENS) if i >= index else n for i, n in enumerate(counts))
        capped = search.capped(cut, counts)
        if capped is not None:
            yield capped, position
    least = search.cost.macs(listed(search, counts, position)) - WIDTH * search.cost.macs()
    after = range(position + 1, len(search.widths) + 1)
    key: Callable[[int], bool] = lambda at: search.cost.macs(listed(search, counts, at)) <= least  # noqa: E731
    index = bisect_left(after, True, key=key)
    if index < len(after):
        yield counts, after[index]


def at_twelfths(specs: Iterator[dict[str, int]], search: Search) -> Iterator[tuple[int, dict[str, int]]]:
    """The first spec of a walk inside each budget."""
    wanted = list(TWELFTHS)
    for step, spec in enumerate(specs):
        share = search.cost.macs(spec) / search.cost.macs()
        print(f"step {step}: {share:.3f} of the MACs", flush=True)
        while wanted and share <= wanted[0] / 12:
            yield wanted.pop(0), spec
        if not wanted:
            return


if __name__ == "__main__":
    main()
