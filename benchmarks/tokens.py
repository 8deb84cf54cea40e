"""Merging tokens next to narrow layers alone, nothing trained: top-1 at a ladder of budgets.

    python benchmarks/tokens.py --model deit_tiny

Calibrates on 1,000 training images without using their labels for the list, reports top-1 on the validation images:
the width list, the list over both axes made in the same run, and what the latter merges. The network is kept in
`benchmarks/work`; a second run only evaluates.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import MODELS, WORK, converted, real_batches, real_model, write_results

import stratavit

TWELFTHS = (10, 8, 6, 4, 3)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    args = arguments.parse_args()
    net = converted(args.model, WORK, axes=("width", "tokens"))
    validation = real_batches(real_model(args.model), "val")
    dense = stratavit.evaluate(net, validation).top1
    rows: list[dict[str, Any]] = []
    for what, axes in (("width", "width"), ("width and tokens", "both")):
        row: dict[str, Any] = {"list": what}
        for twelfths in TWELFTHS:
            spec = net.spec(macs=twelfths / 12, axes=axes)
            row[f"{twelfths}/12"] = round(stratavit.evaluate(net, validation, spec).top1, 1)
        for twelfths in TWELFTHS:
            resolved = net.resolve(net.spec(macs=twelfths / 12, axes=axes))
            tokens = [f"{name.split('.')[1]}:{n}" for name, n in resolved.items() if name.endswith(".tokens")]
            row[f"tokens {twelfths}/12"] = " ".join(tokens)
        rows.append(row)
    note = (
        f"Dense: {dense:.1f}. {sum(len(labels) for _, labels in validation)} validation images, 1,000 for calibration. "
        "Tokens: block:patch tokens that it passes on."
    )
    write_results(f"tokens-{args.model}", rows, note)


if __name__ == "__main__":
    main()
