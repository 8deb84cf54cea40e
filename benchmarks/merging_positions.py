"""Where is a merged token of a rotary ViT? At the position of its destination, or at the mean of its patches.

    python benchmarks/merging_positions.py [--seeds 3]

A small DINOv3 (rotary positions only, 64 patches) is trained on scikit-learn's digits; then tokens are merged in two
of its blocks. The mean is that of the sines and cosines of all patches that a token stands for. No real rotary weights
are among the development data.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from common import write_results
from torch import Tensor, nn

import stratavit
from stratavit.elastic import merging
from stratavit.tasks import demo

EPOCHS, PLACES = 30, (1, 3)  # blocks of six
LEFT = ((52, 44), (44, 32), (32, 20), (24, 10))  # patch tokens of 64 after each place


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    args = arguments.parse_args()
    images, test = demo.digits()
    found: dict[str, list[list[tuple[float, float]]]] = {"destination": [], "mean of its patches": []}
    dense = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = rotary_vit()
        demo.train(model, images, EPOCHS, torch.device("cpu"))  # type: ignore[arg-type]  # trains any classifier
        dense.append(accuracy(model(test.tensors[0]), test.tensors[1]))
        net = stratavit.SuperNet(model, demo.DATA_CONFIG)
        found["destination"].append(measured(net, model, *test.tensors))
        with at_means() as calls:
            found["mean of its patches"].append(measured(net, model, *test.tensors))
        assert calls, "no token had a rotary position"
        print(seed, dense[-1], {name: runs[-1] for name, runs in found.items()}, flush=True)
    rows = [{"position": name, **cells(runs)} for name, runs in found.items()]
    note = (
        f"KL from the model that merges none, nats, and in brackets top-1, on 360 test images; means of {args.seeds} "
        f"seeds. Columns: patch tokens left of 64 after blocks {PLACES[0]} and {PLACES[1]} of six. "
        f"Dense top-1 {sum(dense) / len(dense):.1f}."
    )
    write_results("merging-positions", rows, note)


def rotary_vit() -> nn.Module:
    """A DINOv3 for 8 x 8 images: 64 patches, width 64, 6 blocks, 2 heads of 32, rotary positions only."""
    size = {"img_size": 8, "patch_size": 1, "embed_dim": 64, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_dinov3", in_chans=1, num_classes=10, **size)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
        elif "gamma" in name:  # LayerScale, which begins at 1e-5 for long training
            nn.init.ones_(parameter)
    return model


@torch.inference_mode()
def measured(net: stratavit.SuperNet, dense: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Divergence and top-1 at each number of tokens."""
    source, found = dense.eval()(images).log_softmax(dim=-1), []
    for left in LEFT:
        spec = {f"blocks.{place}.tokens": count for place, count in zip(PLACES, left, strict=True)}
        logits = net.extract(spec=spec, verbose=False).eval()(images)
        divergence = F.kl_div(logits.log_softmax(dim=-1), source, log_target=True, reduction="batchmean")
        found.append((float(divergence), accuracy(logits, labels)))
    return found


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * float((logits.argmax(dim=-1) == labels).float().mean())


@contextmanager
def at_means() -> Iterator[list[int]]:
    """Merged tokens are at the mean of the sines and cosines of their patches meanwhile; yields the calls."""
    merge, homes, calls = merging.merge, [], []

    def noted(state: merging.Merged, compared: Tensor, keep: int, prefix: int) -> merging.Merged:
        after = merge(state, compared, keep, prefix)
        homes[:] = [after.home]
        return after

    def placed(rope: Tensor, place: Tensor) -> Tensor:
        calls.append(place.shape[1])
        members = F.one_hot(homes[0], place.shape[1]).transpose(1, 2).type_as(rope)  # [B, n, N]
        weights = members / members.sum(dim=2, keepdim=True)
        return weights.unsqueeze(1) @ rope.view(1, 1, *rope.shape)  # [B, 1, n, D]

    with mock.patch.multiple(merging, merge=noted, placed=placed):
        yield calls


def cells(runs: list[list[tuple[float, float]]]) -> dict[str, str]:
    """A row's cells: means over the seeds."""
    found = {}
    for number, left in enumerate(LEFT):
        divergences, accuracies = zip(*(run[number] for run in runs), strict=True)
        mean = sum(divergences) / len(runs)
        found[f"{left[0]}, {left[1]}"] = f"{mean:.4f} ({sum(accuracies) / len(runs):.1f})"
    return found


if __name__ == "__main__":
    main()
