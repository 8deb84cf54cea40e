"""Pruning criteria against WPAC: every attention (then every MLP) cut to the same width, no training.

    python benchmarks/criteria.py [--model deit_tiny]

Calibrates on the 1,000 training images, reports top-1 on the 433 validation images.
"""

from __future__ import annotations

import argparse

from common import MODELS, real_batches, real_model, write_results

import stratavit
from stratavit.calibration.wpac import CRITERIA

ATTENTION, MLP = (48, 32, 16), (576, 384, 192)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    model = real_model(name := arguments.parse_args().model)
    calibration, validation = real_batches(model, "train"), real_batches(model, "val")
    dense = stratavit.evaluate(model, validation)
    rows = []
    for criterion in reversed(CRITERIA):
        net = stratavit.SuperNet(model).contract(calibration, criterion=criterion)
        row: dict[str, str | float] = {"criterion": criterion}
        for kind, widths in (("attention", ATTENTION), ("mlp", MLP)):
            for width in widths:
                spec = {site.name: width for site in net.sites if site.kind == kind}
                row[f"{kind} {width}"] = stratavit.evaluate(net, validation, spec).top1
        rows.append(row)
        print(row, flush=True)
    note = f"{name}: top-1 on {dense.n} validation images; dense {dense.top1:.2f} %. Calibrated on the 1,000 images."
    write_results(f"criteria-{name}", rows, note)


if __name__ == "__main__":
    main()
