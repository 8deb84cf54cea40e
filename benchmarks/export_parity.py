"""Do exported files answer as the models do? DeiT-Tiny at five budgets, ONNX and torch.export, on real images.

python benchmarks/export_parity.py [--work WORK] [--axes both]

`--axes both`: sizes of the list over width and tokens, which merge tokens, in place of the width list's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import WORK, converted, real_batches, write_results

from stratavit import export
from stratavit.interop.export import SUFFIXES

SHARES = (1.0, 10 / 12, 6 / 12, 4 / 12)
IMAGES = 32


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--axes", choices=("width", "both"), default="width")
    args = arguments.parse_args()
    both = args.axes == "both"
    net = converted("deit_tiny", args.work, **({"axes": ("width", "tokens")} if both else {}))
    images = torch.cat([batch for batch, _ in real_batches(net, "val", IMAGES)])
    smallest = net.spec(macs=4 / 12, axes=args.axes)
    specs = {f"{share:.3g}": dict(net.spec(macs=share, axes=args.axes)) for share in SHARES}
    specs["0.333, three modules cut to 0"] = dict(smallest) | {
        "blocks.3.attn": 0,
        "blocks.7.mlp": 0,
        "blocks.11.attn": 0,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in specs.items():
            small = net.extract(spec=spec)
            for kind in ("onnx", "openvino", "torch"):
                found = export(small, Path(folder) / f"{len(rows)}{SUFFIXES[kind]}", kind, images)
                rows.append(
                    {
                        "share of MACs": name,
                        "format": kind,
                        "images": found.images,
                        "largest logit difference": f"{found.difference:.1e}",
                        "largest logit": found.largest,
                        "MB": found.size / 1e6,
                    }
                )
    note = "Each file is run on all images at once and on the first alone; float32, on the CPU. Asked: at most 1e-4."
    write_results("export-parity-tokens" if both else "export-parity", rows, note)


if __name__ == "__main__":
    main()
