"""Rotary attention with q and k whole, and cut by rotation pairs: smallest sizes, and distances to the dense model.

    python benchmarks/rotary.py

Smallest share of the MACs of DINOv3-S and EVA-02-S, before whole modules are left out; it follows from shapes alone.
KL divergence and top-1 of small rotary ViTs trained on scikit-learn's digits, without training after the cut. Whole:
the same code with the width of q and k held at the full one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from common import write_results
from torch.utils.data import DataLoader, Subset

import stratavit
from stratavit import SuperNet
from stratavit.elastic import rotary, site
from stratavit.tasks import demo

MODELS = ("vit_small_patch16_dinov3", "eva02_small_patch14_224")
TWELFTHS = (10, 8, 6, 4, 3, 2)
EPOCHS = 8


def rotary_vit(name: str) -> Any:
    """The demo's sizes in an architecture with rotary positions; Xavier's weights learn digits in seconds."""
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    model = timm.create_model(name, embed_dim=96, depth=4, num_heads=3, **sizes)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter)
        elif ".gamma_" in key:  # LayerScale begins near zero, which takes long training
            torch.nn.init.ones_(parameter)
    return model


@contextmanager
def whole() -> Iterator[None]:
    """q and k keep their full width, inside."""
    with ExitStack() as stack:
        for module in (site, rotary):
            stack.enter_context(mock.patch.object(module, "rotary_width", lambda width, full: full if width else 0))
        yield


@contextmanager
def cut() -> Iterator[None]:
    """As the library does it."""
    yield


def smallest(name: str) -> float:
    """Share of the MACs with one unit of every module, in percent."""
    net = SuperNet(timm.create_model(name))
    return 100 * net.macs({one.name: one.last_unit for one in net.sites}) / net.macs()


def measured(model: Any, calibration: Any, images: Any, labels: Any) -> dict[str, tuple[float, float]]:
    """KL to the dense model and top-1 at shares of the MACs."""
    net = SuperNet(copy.deepcopy(model), demo.DATA_CONFIG).contract(calibration).stratify(calibration).eval()
    found = {}
    with torch.no_grad():
        dense = model(images).log_softmax(-1)
        for twelfth in TWELFTHS:
            logits = net(images, net.spec(macs=twelfth / 12))
            kl = torch.nn.functional.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="batchmean")
            found[f"{twelfth}/12"] = (float(kl), 100 * float((logits.argmax(-1) == labels).float().mean()))
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, default=2)
    args = arguments.parse_args()
    train, test = demo.digits()
    calibration = DataLoader(Subset(train, range(512)), 256)
    images, labels = next(iter(DataLoader(test, 360)))
    rows: list[dict[str, Any]] = []
    models = {}
    for name in MODELS:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            models[name, seed] = rotary_vit(name)
            demo.train(models[name, seed], train, EPOCHS, torch.device("cpu"))
    for arm in (whole, cut):
        with arm():
            for name in MODELS:
                runs = [measured(models[name, seed], calibration, images, labels) for seed in range(args.seeds)]
                row: dict[str, Any] = {"model": name, "q and k": arm.__name__, "least MACs": f"{smallest(name):.1f} %"}
                for key in runs[0]:
                    kl, top1 = (sum(run[key][i] for run in runs) / len(runs) for i in (0, 1))
                    row[key] = f"{kl:.3f} ({top1:.1f})"
                rows.append(row)
                print(row, flush=True)
    note = f"KL (top-1), mean of {args.seeds} seeds; stratavit {stratavit.__version__}."
    write_results("rotary", rows, note)


if __name__ == "__main__":
    main()
