"""One-shot accuracy, no training: this library against pruning criteria and against other tools.

    pip install '.[peers]'
    python benchmarks/quality.py --model deit_tiny [--picture PNG] [--only ours peers]

Everything is calibrated on the same 1,000 training images and measured on the same 433 validation images, at 10/12,
8/12, 6/12 and 4/12 of the linear MACs; what a row really kept is in the CSV. `criterion` rows cut the same places (head
widths and MLPs) by other scores, all else as in the paper. Other tools are driven by their own public interface, in
`peers.py` and `fastnas.py`; rows whose tool is not installed are left out, and said so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import fastnas
import peers
import tome
from common import MODELS, Batches, Journal, draw_lines, real_batches, real_model, write_results
from torch import nn

import stratavit
from stratavit.calibration.wpac import CRITERIA, Criterion
from stratavit.dropout_list import sensitivity

TWELFTHS = (10, 8, 6, 4)
TITLES = {"wpac": "paper: WPAC", "pca": "criterion: PCA"}
OURS, BOTH = "StrataViT, default", "StrataViT, width and tokens"
TOME = "tokens: r merged in every block"
GROUPS = {  # label in the picture -> beginning of the rows' titles
    "the paper, one-shot": TITLES["wpac"],
    "best of five pruning criteria": "criterion:",
    "Torch-Pruning, best of six settings": "Torch-Pruning",
    "ModelOpt FastNAS (MLPs only), best of two": "ModelOpt",
    TOME: TOME,
    OURS: OURS,
    BOTH: BOTH,
}
Row = dict[str, Any]
Made = tuple[str, Callable[[], Row]]  # title of a row, and how to measure it


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument(
        "--only", nargs="+", choices=("ours", "criteria", "peers", "tokens"), help="parts (default: all)"
    )
    arguments.add_argument("--picture", help="PNG of the best of each group of rows")
    arguments.add_argument(
        "--journal", type=Path, help="file that rows are kept in; an interrupted run goes on from it"
    )
    args = arguments.parse_args()
    model = real_model(args.model)
    calibration, validation = real_batches(model, "train"), real_batches(model, "val")
    dense = stratavit.evaluate(model, validation)
    parts = {"criteria": criteria_rows, "peers": peer_rows, "tokens": token_rows, "ours": our_rows}
    journal = Journal(args.journal, "what")
    rows: list[Row] = []
    for part in args.only or parts:
        for title, make in parts[part](model, calibration, validation):
            if {"what": title} not in journal:
                journal.add(make())
            rows.append(journal.rows[title,])
    note = (
        f"Top-1 of {args.model}, dense {dense.top1:.1f}, on {dense.n} validation images (standard error about 2);"
        f" calibrated on {sum(len(y) for _, y in calibration)} training images, nothing trained. Every sub-network "
        "keeps at most the share of linear MACs that its column names; `kept` is what it has. "
        f"Tools: {peers.versions()}"
    )
    if args.picture:
        title = f"{args.model}, calibrated on 1,000 images, no training"
        draw_lines(lines_of(rows, dense.top1), args.picture, title, best=OURS, first="-")
    write_results(f"quality-{args.model}", rows, note)


def row_of(what: str, size: Callable[[int], tuple[float, float] | None]) -> Row:
    """A row of the table; `size` gives top-1 and share of the MACs at so many twelfths, None for out of reach."""
    found = {twelfths: size(twelfths) for twelfths in TWELFTHS}
    top1 = {f"{t}/12": "-" if pair is None else round(pair[0], 1) for t, pair in found.items()}
    kept = {f"kept {t}/12": "-" if pair is None else round(pair[1], 4) for t, pair in found.items()}
    return {"what": what, **top1, **kept}


def sliced(net: stratavit.SuperNet, validation: Batches, axes: str = "width") -> Callable[[int], tuple[float, float]]:
    """Top-1 and share of the sub-networks of a super-network."""

    def size(twelfths: int) -> tuple[float, float]:
        spec = net.spec(macs=twelfths / 12, axes=axes)
        return stratavit.evaluate(net, validation, spec).top1, net.macs(spec) / net.macs()

    return size


def criteria_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Made]:
    """Other scores in the place of WPAC, and WPAC, each with the list that the paper makes from it."""
    measure = sensitivity.bypass_sensitivity
    known: dict[str, float] = {}

    def once(*arguments: Any) -> dict[str, float]:
        """Bypassing a module does the same in any coordinates: measured for the first row, kept for the others."""
        if not known:
            known.update(measure(*arguments))
        return dict(known)

    def make(title: str, criterion: Criterion) -> Row:
        net = stratavit.SuperNet(model).contract(calibration, criterion=criterion)
        with mock.patch.object(sensitivity, "bypass_sensitivity", once):
            net.stratify(calibration)
        return row_of(title, sliced(net, validation))

    for criterion in CRITERIA[::-1]:
        if criterion != "output":  # our own coordinates, without the rest of the default
            title = TITLES.get(criterion, f"criterion: {criterion}")
            yield title, partial(make, title, criterion)


def our_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Made]:
    """The default method: the width list, and the list over width and tokens that the same run makes."""

    @cache
    def net() -> stratavit.SuperNet:
        return stratavit.SuperNet(model).contract(calibration).stratify(calibration, axes=("width", "tokens"))

    yield OURS, lambda: row_of(OURS, sliced(net(), validation))
    yield BOTH, lambda: row_of(BOTH, sliced(net(), validation, "both"))


def token_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Made]:
    """Merging alone, the smallest number in every block that keeps the budget."""

    def size(twelfths: int) -> tuple[float, float] | None:
        found = tome.within(model, twelfths / 12)
        return found and (stratavit.evaluate(found[0], validation).top1, found[1])

    yield TOME, lambda: row_of(TOME, size)


def peer_rows(model: nn.Module, calibration: Batches, validation: Batches) -> Iterator[Made]:
    """Other tools, each model pruned anew for every size."""
    gradients = cache(lambda: peers.gradients_of(model, calibration))

    def make(title: str, within: Callable[[float], tuple[nn.Module, float] | None]) -> Row:
        def size(twelfths: int) -> tuple[float, float] | None:
            found = within(twelfths / 12)
            return None if found is None else (stratavit.evaluate(found[0], validation).top1, found[1])

        return row_of(title, size)

    for title, prune in peers.PEERS.items():
        if peers.installed(prune.package):
            yield title, partial(make, title, lambda share, prune=prune: peers.within(model, gradients(), share, prune))
        else:
            print(f"{title}: not installed, left out")
    for title, score in fastnas.TITLES.items():
        if peers.installed(fastnas.PACKAGE):
            yield title, partial(make, title, fastnas.FastNAS(model, score, calibration).within)
        else:
            print(f"{title}: not installed, left out")


def lines_of(rows: list[Row], dense: float) -> dict[str, list[tuple[float, float]]]:
    """Label of each group of rows -> share of the MACs and top-1, the best of the group at every size."""
    lines = {}
    for label, start in GROUPS.items():
        group = [row for row in rows if row["what"].startswith(start)]
        pairs = {n: [(row[f"{n}/12"], row[f"kept {n}/12"]) for row in group if row[f"{n}/12"] != "-"] for n in TWELFTHS}
        best = [max((float(top1), float(kept)) for top1, kept in found) for found in pairs.values() if found]
        if group:
            lines[label] = [(1.0, dense), *((kept, top1) for top1, kept in best)]
    return lines


if __name__ == "__main__":
    main()
