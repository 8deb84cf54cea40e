"""How tokens should be merged: one destination in how many, and how sizes enter attention.

    python benchmarks/merging.py [--images 200]

Destinations: divergence from dense DeiT-Tiny on calibration images that the search for tokens did not use, at sizes of
the list over width and tokens, which was made with one in three; where fewer can be merged at once, fewer are. Sizes in
attention: an additive mask beside one more coordinate of q and k, padded to eight; both are exact.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch
import torch.nn.functional as F
from common import WORK, Batches, converted, interleaved, real_batches, real_model, write_results
from torch import Tensor, nn

from stratavit.calibration.objectives import distance
from stratavit.elastic import merging
from stratavit.models.cost import linear_macs

TWELFTHS, SIZE = (8, 6, 4, 3), (3, 224, 224)
SHAPES = ((1, 3, 149, 64), (64, 3, 149, 64), (64, 3, 93, 64), (1, 12, 149, 64), (16, 12, 149, 64))  # B, H, N, d
REPEAT = 40


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=200, help="to measure the divergence on")
    args = arguments.parse_args()
    images = real_batches(real_model("deit_tiny"), "train")[-(args.images // 50) :]
    net = converted("deit_tiny", WORK, axes=("width", "tokens"))
    smalls = {n: net.extract(macs=n / 12, axes="both", verbose=False) for n in TWELFTHS}
    dense, full, rows = net.extract(spec={}), net.macs(), []
    for every in (2, 3, 4):
        with mock.patch.object(merging, "EVERY", every):
            found = {f"{n}/12": round(divergence(small, dense, images), 3) for n, small in smalls.items()}
            shares = {f"share {n}/12": round(linear_macs(small, SIZE) / full, 3) for n, small in smalls.items()}
        rows.append({"one destination in": every, **found, **shares})
        print(rows[-1], flush=True)
    write_results("merging-destinations", rows, f"KL in nats, {sum(len(x) for x, _ in images)} images, DeiT-Tiny.")
    note = "Attention alone, its inputs given; median of 40 runs in turns."
    write_results("merging-attention", [attention(*shape) for shape in SHAPES], note)


@torch.inference_mode()
def divergence(small: nn.Module, dense: nn.Module, images: Batches) -> float:
    """Mean KL of a small model from the dense one."""
    total = sum(float(distance(small(batch), dense(batch), 1000)) for batch, _ in images)
    return total / sum(len(batch) for batch, _ in images)


@torch.inference_mode()
def attention(batch: int, heads: int, tokens: int, width: int) -> dict[str, str | float]:
    """Milliseconds of attention that sees tokens by their sizes, in both forms, and of plain attention."""
    q, k, v = (torch.randn(batch, heads, tokens, width) for _ in range(3))
    size = torch.randint(1, 6, (batch, 1, 1, tokens)).log()

    def coordinate() -> Tensor:
        one, more = (torch.zeros(batch, heads, tokens, 8) for _ in range(2))
        one[..., 0], more[..., 0] = 1, width**0.5 * size.squeeze(2)
        return F.scaled_dot_product_attention(torch.cat([q, one], -1), torch.cat([k, more], -1), v, scale=width**-0.5)

    forms = {
        "mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=size),
        "coordinate": coordinate,
        "neither": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    assert torch.allclose(forms["mask"](), coordinate(), atol=1e-4)
    seconds = interleaved(forms, REPEAT)
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "width": width}
    return {**shape, **{f"{name} ms": round(1000 * value, 3) for name, value in seconds.items()}}


if __name__ == "__main__":
    main()
