"""By what a token's gradient is compared when it is weighed: how far small networks are from the dense model.

    python benchmarks/token_weights.py --model deit_tiny

Real weights; calibrated on every second training image and measured on the others, and the other way round. The keep
ratio is the same everywhere, so that no list plays a part. Nothing is trained.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from unittest import mock

import torch
import torch.nn.functional as F
from common import MODELS, Batches, even, real_batches, real_model, write_results
from torch import Tensor, nn

import stratavit
from stratavit.calibration import site_observer

TWELFTHS = (9, 7, 5)  # of the MACs
OWN = "its image's other tokens (the default)"
ARMS = {"nothing: all tokens weigh the same": 0.0, OWN: 0.5, "all tokens of all images": 0.5}


class OverAllImages:
    """Weights of tokens by the mean gradient norm over all images, which a first pass finds out.

    Sites ask in the same order at every pass over a few images.

    Args:
        sites: Their number.
    """

    def __init__(self, sites: int) -> None:
        self.sites, self.asked, self.known = sites, 0, False
        self.sums, self.counts = [0.0] * sites, [0] * sites

    def __call__(self, norms: Tensor, share: float) -> Tensor:
        """What takes the place of `site_observer.token_weights`; in the first pass all tokens weigh the same."""
        site = self.asked % self.sites
        self.asked += 1
        if not self.known:
            self.sums[site] += float(norms.double().sum())
            self.counts[site] += norms.numel()
            return torch.ones_like(norms)
        return 1 - share + share * norms * (self.counts[site] / self.sums[site])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="deit_tiny")
    args = arguments.parse_args()
    model = real_model(args.model)
    images, labels = (torch.cat(parts) for parts in zip(*real_batches(model, "train", 1000), strict=True))
    halves = [list(zip(images[i::2].split(50), labels[i::2].split(50), strict=True)) for i in (0, 1)]
    rows = []
    for what, share in ARMS.items():
        row: dict[str, str | float] = {"a token's gradient is compared with": what}
        found = [measured(model, what, share, *pair) for pair in (halves, halves[::-1])]
        for twelfths, *pairs in zip(TWELFTHS, *found, strict=True):
            row[f"KL {twelfths}/12"] = round(fmean(kl for kl, _ in pairs), 4)
            row[f"top-1 {twelfths}/12"] = round(fmean(top1 for _, top1 in pairs), 1)
        rows.append(row)
        print(row, flush=True)
    note = (
        "KL: of the small network's classes from the dense model's, mean over 1,000 training images, each measured by "
        "a network that was calibrated on the other 500. Sizes: of the MACs, the same ratio everywhere."
    )
    write_results(f"token-weights-{args.model}", rows, note)


def measured(
    model: nn.Module, what: str, share: float, calibration: Batches, test: Batches
) -> list[tuple[float, float]]:
    """KL and top-1 at every size."""
    net = stratavit.SuperNet(model)
    if what == OWN or not share:
        net.contract(calibration, token_weight=share)
    else:
        weights = OverAllImages(len(net.sites))
        with mock.patch.object(site_observer, "token_weights", weights):
            stratavit.SuperNet(model).contract(calibration, token_weight=share)
            weights.known = True
            net.contract(calibration, token_weight=share)
    return [compared(model, net.extract(spec=even(net, n / 12), verbose=False), test) for n in TWELFTHS]


@torch.inference_mode()
def compared(model: nn.Module, small: nn.Module, test: Batches) -> tuple[float, float]:
    """Mean KL and top-1 of a small network."""
    kl, right = [], []
    for images, labels in test:
        dense, ours = model.eval()(images), small.eval()(images)
        kl.append(F.kl_div(ours.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True))
        right.append((ours.argmax(dim=1) == labels).float().mean())
    return float(torch.stack(kl).mean()), 100 * float(torch.stack(right).mean())


if __name__ == "__main__":
    main()
