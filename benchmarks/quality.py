"""One-shot accuracy, no training: this library against pruning criteria and against other tools.

    pip install '.[peers]'
    python benchmarks/quality.py --model deit_tiny [--picture PNG] [--only ours peers]

Everything is calibrated on the same 1,000 training images and measured on the same 433 validation images, at 10/12,
8/12, 6/12 and 4/12 of the linear MACs; what a row really kept is in the CSV. `criterion` rows cut the same places (head
widths and MLPs) by other scores, all else as in the paper. Other tools are driven by their own public interface, in
`peers.py`; rows whose tool is not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import peers
from common import MODELS, Batches, draw_lines, real_batches, real_model, write_results
from torch import nn

import stratavit
from stratavit.wpac import CRITERIA

TWELFTHS = (10, 8, 6, 4)
TITLES = {"wpac": "paper: WPAC", "pca": "criterion: PCA"}
Row = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--only", nargs="+", choices=("ours", "criteria", "peers"), help="parts (default: all)")
    arguments.add_argument("--picture", help="PNG of the rows")
    args = arguments.parse_args()
    model = real_model(args.model)
    calibration, validation = real_batches(model, "train"), real_batches(model, "val")
    dense = stratavit.evaluate(model, validation)
    parts = {"criteria": criteria_rows, "peers": peer_rows, "ours": our_rows}
    rows: list[Row] = []
    for part in args.only or parts:
        for row in parts[part](model, calibration, validation):
            rows.append(row)
            print(row, flush=True)
    note = (
        f"Top-1 of {args.model}, dense {dense.top1:.1f}, on {dense.n} validation images (standard error about 2);"
        f" calibrated on {sum(len(y) for _, y in calibration)} training images, nothing trained. Every sub-network "
        "keeps at most the share of linear MACs that its column names; `kept` is what it has. "
        f"Tools: {peers.versions()}"
    )
    if args.picture:
        draw(rows, dense.top1, args.picture, f"{args.model}, calibrated on 1,000 images, no training")
    write_results(f"quality-{args.model}", rows, note)


def row_of(what: str, size: Callable[[int], tuple[float, float]]) -> Row:
    """A row of the table; `size` gives top-1 and share of the MACs at so many twelfths."""
    found = {twelfths: size(twelfths) for twelfths in TWELFTHS}
    top1 = {f"{twelfths}/12": round(value, 1) for twelfths, (value, _) in found.items()}
    return {"what": what, **top1, **{f"kept {t}/12": round(share, 4) for t, (_, share) in found.items()}}


def sliced(net: stratavit.SuperNet, validation: Batches) -> Callable[[int], tuple[float, float]]:
    """Top-1 and share of the sub-networks of a super-network."""

    def size(twelfths: int) -> tuple[float, float]:
        spec = net.spec(macs=twelfths / 12)
        return stratavit.evaluate(net, validation, spec).top1, net.macs(spec) / net.macs()

    return size


def criteria_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Row]:
    """Other scores in the place of WPAC, and WPAC, each with the list that the paper makes from it."""
    for criterion in CRITERIA[::-1]:
        if criterion == "output":
            continue  # our own coordinates, without the rest of the default
        net = stratavit.SuperNet(model).contract(calibration, criterion=criterion).stratify(calibration)
        yield row_of(TITLES.get(criterion, f"criterion: {criterion}"), sliced(net, validation))


def our_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Row]:
    """The default method."""
    net = stratavit.SuperNet(model).contract(calibration).stratify(calibration)
    yield row_of("StrataViT, default", sliced(net, validation))


def peer_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Row]:
    """Other tools, each model pruned anew for every size."""
    gradients = peers.gradients_of(model, calibration)
    for title, prune in peers.PEERS.items():
        if not peers.installed(prune):
            print(f"{title}: not installed, left out")
            continue

        def size(twelfths: int, prune: peers.Prune = prune) -> tuple[float, float]:
            small, share = peers.within(model, gradients, twelfths / 12, prune)
            return stratavit.evaluate(small, validation).top1, share

        yield row_of(title, size)


def draw(rows: list[Row], dense: float, path: str, title: str) -> None:
    """Top-1 against share of MACs, a line a row."""
    lines = {row["what"]: [(1.0, dense), *((row[f"kept {n}/12"], row[f"{n}/12"]) for n in TWELFTHS)] for row in rows}
    draw_lines(lines, path, title, best="StrataViT, default", first=":")


if __name__ == "__main__":
    main()
