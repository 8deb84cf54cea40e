"""Tables as the pages show them: share of the dense model's accuracy that is kept, top-1 in brackets.

    python benchmarks/shares.py [tokens-deit_tiny ...]

Nothing is measured: reads the newest results of `tokens.py`, `quality.py`, `one_shot.py` and `criteria.py`, and the
dense top-1 from their notes.
"""

from __future__ import annotations

import argparse
import csv
import re

from common import RESULTS

NAMES = (
    "tokens-deit_tiny",
    "tokens-vit_tiny_augreg",
    "quality-deit_tiny",
    "quality-vit_tiny_augreg",
    "one-shot-deit_tiny",
    "one-shot-vit_tiny_augreg",
    "criteria-deit_tiny",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", help=f"results (default: {' '.join(NAMES)})")
    for name in arguments.parse_args().names or NAMES:
        path = max(RESULTS.glob(f"????-??-??-{name}.csv"))
        about = re.search(r"[Dd]ense:? (\d+\.\d+)", path.with_suffix(".md").read_text(encoding="utf-8"))
        if about is None:
            raise SystemExit(f"{path.stem}: its page does not say the dense top-1")
        dense = float(about[1])
        print(f"\n{path.stem}, dense {dense}\n")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [column for column in rows[0] if re.fullmatch(r"\d+/12|(attention|mlp) \d+", column)]
        print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
        for row in rows:
            title = row.get("what") or row["criterion"]
            print(f"| {title} | " + " | ".join(cell(row[column], dense) for column in columns) + " |")


def cell(top1: str, dense: float) -> str:
    """A top-1 as a share of the dense model's, in whole percent: both have errors of a point or more."""
    return f"{100 * float(top1) / dense:.0f} % ({float(top1):.1f})" if top1 not in ("", "-") else "not reached"


if __name__ == "__main__":
    main()
