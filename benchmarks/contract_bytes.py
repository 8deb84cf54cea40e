"""Which large models can be contracted on which GPU? Bytes that `contract` and `stratify` hold there, by arithmetic.

    python benchmarks/contract_bytes.py

Nothing of this is measured on a GPU. Weights, sums and moments are counted on the meta device. What one image leaves
for the backward pass is counted in one block that runs on the CPU, and multiplied.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from common import write_results
from torch import Tensor, nn

from stratavit.calibration.contraction import DEVICE_BYTES, TOKEN_WEIGHT
from stratavit.calibration.site_observer import SiteObserver
from stratavit.calibration.statistics import _runs
from stratavit.calibration.sums_place import count_bytes
from stratavit.elastic.base import ElasticSite
from stratavit.elastic.network import sites_in
from stratavit.models.families import elastic_sites, stages
from stratavit.utils.model import eval_mode, frozen

SHAPES = {
    "ViT-L/16, 224 px": ("vit_large_patch16_224", 224),
    "DINOv2-g/14, 224 px": ("vit_giant_patch14_dinov2", 224),
    "DINOv2-g/14, 518 px": ("vit_giant_patch14_dinov2", 518),
    "ViT-g/14, 224 px": ("vit_giant_patch14_224", 224),
}
BATCH, SMALL_BATCH = 64, 8  # of `convert` if not said otherwise, and one for a small card


class Witness(SiteObserver):
    """An observer that keeps what it is shown, as it waits for the gradient."""

    def __init__(self, site: ElasticSite, images: int) -> None:
        super().__init__(site, "weighted", TOKEN_WEIGHT)
        self.sizes, self.shown = (images, 0), []

    def inputs_of_out(self, features: Tensor) -> None:
        """Keeps what `proj` or `fc2` reads."""
        super().inputs_of_out(features)
        self.shown.append(features.detach())


def main() -> None:
    rows = [found for shape, (name, pixels) in SHAPES.items() for found in shape_rows(shape, name, pixels)]
    note = (
        "Arithmetic, not measured: float32, decimal gigabytes. Weights: of the super-network alone; a source model on "
        "the same device comes on top. Activations: what one block keeps for the backward pass of one image and what "
        "is observed in it, counted on the CPU, times blocks and images that run at a time (batches of "
        f"{BATCH}). Sorting: of the sites that are sorted together, table and covariances. Contract: weights, and the "
        "larger of pass and sorting, with sums and moments on the device or on the host. Stratify: weights, moments of "
        f"one fold, and activations of a batch of {SMALL_BATCH}. Workspaces of libraries, fragments and gradients in "
        "flight are not counted."
    )
    write_results("contract-bytes", rows, note)


def shape_rows(shape: str, name: str, pixels: int) -> list[dict[str, Any]]:
    """All rows of one model."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=pixels)
    sites, _ = elastic_sites(model)
    found = count_bytes(sites.values())
    weights = sum(tensor.nbytes for tensor in model.parameters())
    sizes = block_bytes(name, pixels)
    image = (sizes[4] - sizes[2]) / 2  # the rest does not depend on images: copies of weights
    running = _runs(torch.empty(BATCH, *tokens_of(model, pixels), device="meta"))[0]
    count, blocks = running.stop - running.start, len(sites) // 2

    def activations(images: int) -> float:
        return blocks * (sizes[2] + (images - 2) * image)

    sorting = max(sorting_bytes(*site.out.weight.shape) for site in sites.values())
    factor = sum(4 * site.out.weight.shape[1] ** 2 for site in sites.values())
    parts = {
        "weights": weights,
        "sums": found.sums,
        "moments that are kept": found.kept,
        "product of a batch, largest site": found.product,
        f"activations, {count} images": activations(count),
        "sorting": sorting,
        "contract, device": weights + max(found.sums + activations(count), found.peak + sorting),
        "contract, host": weights + max(found.product + activations(count), sorting),
        f"stratify, host, batches of {SMALL_BATCH}": weights + factor + activations(SMALL_BATCH),
    }
    return [{"shape": shape, "what": what, "GB": size / 1e9} for what, size in parts.items()]


def tokens_of(model: nn.Module, pixels: int) -> tuple[int, ...]:
    """Shape of the tokens of an image."""
    with torch.no_grad():
        return tuple(stages(model).stem(torch.empty(1, 3, pixels, pixels, device="meta")).shape[1:])


def block_bytes(name: str, pixels: int) -> dict[int, int]:
    """Number of images -> what one block keeps of them until the backward pass."""
    model = timm.create_model(name, img_size=pixels, depth=1)
    sites, _ = elastic_sites(model)
    for path, site in sites.items():
        model.set_submodule(path, site)
    found = {}
    for images in (2, 4):
        for site in sites.values():
            site.observer = Witness(site, images)
        with eval_mode(model), frozen(model):
            found[images] = kept_bytes(model, torch.randn(images, 3, pixels, pixels))
    return found


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of all storages, but for weights, that a forward pass through the blocks leaves."""
    known, kept = {storage_of(tensor) for tensor in model.parameters()}, []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.no_grad():
        tokens = stages(model).stem(images)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = stages(model).through(tokens.requires_grad_(True))
    for site in sites_in(model).values():
        kept += site.observer.shown
    sizes = {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    del out
    return sum(size for storage, size in sizes.items() if storage not in known)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def sorting_bytes(outputs: int, n: int) -> int:
    """Of sites ``[outputs, n]`` sorted together: tables, maps, a covariance and its factor; or moments of one site."""
    table = 4 * n * (n + outputs)
    together = max(1, DEVICE_BYTES // table)
    return max(together * (table + 4 * n * outputs) + 2 * 4 * n * n, 4 * 4 * n * n)


if __name__ == "__main__":
    main()
