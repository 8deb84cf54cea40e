"""Seconds that `SuperNet(model)` takes, with the package that is imported: best of several, one thread.

Run in the tree before and after a change: ``PYTHONPATH=src python benchmarks/construction.py``.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

import stratavit

MODELS = ("deit_tiny_patch16_224", "deit_base_patch16_224", "swin_tiny_patch4_window7_224")


def best_of(repeats: int, model: torch.nn.Module) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        stratavit.SuperNet(model)
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {stratavit.__file__}")
    for name in args.models:
        model = timm.create_model(name).eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))  # what is set up once
        print(f"{name}: {best_of(args.repeats, model):.2f} s")


if __name__ == "__main__":
    main()
