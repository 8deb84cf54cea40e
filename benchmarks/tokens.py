"""Merging tokens next to narrow layers alone, nothing trained: top-1 at a ladder of budgets.

    python benchmarks/tokens.py --model deit_tiny [--fixed-only]

Calibrates on 1,000 training images, reports top-1 on the validation images: the width list, the list over both axes
made in the same run, and fixed numbers of tokens at full width. The network is kept in `benchmarks/work`; a second run
only evaluates. `--fixed-only` needs no calibration.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from common import MODELS, WORK, Batches, converted, real_batches, real_model, write_results

import stratavit

TWELFTHS = (10, 8, 6, 4, 3)
FIXED: dict[int, Mapping[int, int]] = {  # twelfths of the MACs -> block -> tokens merged away there
    10: {3: 16, 5: 24, 7: 24, 9: 16},
    8: {1: 16, 3: 32, 5: 32, 7: 24, 9: 16},
    6: {1: 48, 3: 40, 5: 32, 7: 24, 9: 16},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    arguments.add_argument("--fixed-only", action="store_true", help="fixed numbers of tokens alone, a minute")
    args = arguments.parse_args()
    validation = real_batches(real_model(args.model), "val")
    if args.fixed_only:
        net, rows = stratavit.SuperNet(real_model(args.model)).eval(), []
    else:
        net = converted(args.model, WORK, axes=("width", "tokens"))
        rows = [
            row_of(net, validation, what, {n: net.spec(macs=n / 12, axes=axes) for n in TWELFTHS})
            for what, axes in (("width list", "width"), ("list over width and tokens", "both"))
        ]
    rows.append(row_of(net, validation, "fixed tokens, full width", {n: fixed(net, n) for n in FIXED}))
    dense = stratavit.evaluate(net, validation).top1
    note = (
        f"Dense: {dense:.1f}. {sum(len(labels) for _, labels in validation)} validation images, 1,000 for calibration. "
        "Tokens: block:patch tokens that it passes on, of 196."
    )
    write_results(f"tokens-{args.model}", rows, note)


def fixed(net: stratavit.SuperNet, twelfths: int) -> stratavit.Spec:
    """Fixed numbers of tokens for a share of the MACs, all layers at full width."""
    left, spec = net.cost.places[0].width, {}
    for block, merged in FIXED[twelfths].items():
        left -= merged
        spec[f"blocks.{block}.tokens"] = left
    return stratavit.Spec(spec)


def row_of(
    net: stratavit.SuperNet, validation: Batches, what: str, specs: Mapping[int, stratavit.Spec]
) -> dict[str, Any]:
    """Top-1, share of the MACs and tokens at each size."""
    row: dict[str, Any] = {"what": what}
    for twelfths in TWELFTHS:
        spec = net.resolve(specs.get(twelfths))
        known = twelfths in specs
        counts = [f"{name.split('.')[1]}:{n}" for name, n in spec.items() if name.endswith(".tokens")]
        row[f"{twelfths}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1) if known else ""
        row[f"share {twelfths}/12"] = round(net.macs(spec) / net.macs(), 3) if known else ""
        row[f"tokens {twelfths}/12"] = " ".join(counts)
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
