"""What a whole family costs in memory: one set of weights that serves several sizes. DeiT-Tiny.

    python benchmarks/family_memory.py [--work WORK]

Bytes are counted tensor by tensor (`SuperNet.memory`) and checked against the resident memory of a fresh process that
loads and serves: the family, or the largest model alone.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch
from common import WORK, converted, resident, write_results

import stratavit
from stratavit import SuperNet
from stratavit.elastic.memory import size_of

TWELFTHS = (10, 8, 6, 4)
WAYS = ("largest alone", "means only", "4 sizes specialised", "with moments")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument(
        "--way", choices=WAYS, help="serve in this process and print bytes; used by the script itself"
    )
    args = arguments.parse_args()
    if args.way:
        print(*serve(args.work / "deit_tiny", args.way))
        return
    stratavit.save(converted("deit_tiny", args.work).extract(spec={}), args.work / "largest", overwrite=True)
    rows, largest = [], None
    for way in WAYS:
        command = [sys.executable, __file__, "--work", str(args.work), "--way", way]
        counted, before, after, weights, corrected = map(int, subprocess.check_output(command, text=True).split())
        largest = largest or counted
        rows.append(
            {
                "held": way,
                "tensors MB": counted / 1e6,
                "of the largest": counted / largest,
                "weights MB": weights / 1e6,
                "corrected proj / fc2 MB": corrected / 1e6,
                "resident grows by MB": (after - before) / 1e6,
            }
        )
    note = (
        "Sizes 12/12, 10/12, 8/12, 6/12, 4/12 of the MACs, each run on one image in inference mode. Resident: growth "
        "of the process from before loading to after all sizes have run; it includes activations and what the "
        "allocator keeps."
    )
    write_results("family-memory", rows, note)


def serve(folder: Path, way: str) -> tuple[int, int, int, int, int]:
    """Loads, runs every size; bytes counted, resident before and after, of weights, of corrected maps."""
    image = torch.randn(1, 3, 224, 224)
    torch.nn.Linear(8, 8)(torch.randn(2, 8))
    before = resident()
    with torch.inference_mode():
        if way == "largest alone":
            model = stratavit.load(folder.parent / "largest")
            model(image)
            size = size_of(model.state_dict().values())
            return size, before, resident(), size, 0
        net = SuperNet.load(folder, moments=way != "means only")
        specs = [net.spec(macs=n / 12) for n in TWELFTHS]
        if way == "4 sizes specialised":
            net.specialise(*specs)
            gc.collect()
        for spec in [{}, *specs]:
            net(image, spec)
        memory = net.memory()
        return memory.total, before, resident(), memory.weights, memory.corrected


if __name__ == "__main__":
    main()
