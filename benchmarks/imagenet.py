"""The standard table on ImageNet, nothing trained: accuracy that is kept at 10/12 to 4/12 of the MACs.

    python benchmarks/imagenet.py --data IMAGENET [--model deit_tiny] [--weights FOLDER] [--limit 500]

IMAGENET holds ``train/<wnid>/`` and ``val/<wnid>/``. Each model is calibrated on 1,000 training images, once for two
lists: widths alone, and widths and tokens. DeiT-Ti, -S, -B and ViT-B (AugReg) are measured by top-1, DINOv2 ViT-B by
20 nearest neighbours among the training images. Budgets are shares of the linear MACs; MACs with the products of
attention stand beside them. Only a table on all 50,000 validation images calls its figures ImageNet accuracy.

How long it takes is estimated first, from images per second on this machine. Networks and rows are kept in ``--work``:
a run that was stopped goes on, and models may be run one by one; the table always has all rows of these settings.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from common import WORK, Journal, write_results
from torch import nn

import stratavit
from stratavit.artifacts.model_loading import dense_model
from stratavit.data.image_folder import ImageLoader, image_loader
from stratavit.errors import BudgetError
from stratavit.evaluation.accuracy import Metrics
from stratavit.models.architecture import resolve_data_config
from stratavit.utils.devices import pick_device

TWELFTHS = (10, 8, 6, 4)
LISTS = {"width": "width", "both": "width and tokens"}  # axes -> column
FULL = 50_000  # images of the validation split
CONVERT = 60  # dense passes that a calibration image costs, roughly, for both lists
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        title: As papers call it.
        name: timm's name, with the tag of the weights.
        knn: Measured by nearest neighbours.
    """

    title: str
    name: str
    knn: bool = False

    @property
    def architecture(self) -> str:
        """timm's name without the tag."""
        return self.name.partition(".")[0]


MODELS = {
    "deit_tiny": Model("DeiT-Ti", "deit_tiny_patch16_224.fb_in1k"),
    "deit_small": Model("DeiT-S", "deit_small_patch16_224.fb_in1k"),
    "deit_base": Model("DeiT-B", "deit_base_patch16_224.fb_in1k"),
    "vit_base_augreg": Model("ViT-B AugReg", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "dinov2_base": Model("DINOv2 ViT-B, k-NN", "vit_base_patch14_dinov2.lvd142m", knn=True),
}


def main() -> None:
    args = parsed()
    device = pick_device(args.device)
    suffix = f"{args.limit or 'all'}-{args.calibration}-{args.bank or 'all'}"
    journal = Journal(args.work / f"rows-{suffix}.jsonl", "model", "list", "size")
    missing = {key: [size for size in sizes() if row_key(key, *size) not in journal] for key in args.model}
    estimate(args, device, missing)
    for key, left in missing.items():
        for row in rows_of(args, device, key, left) if left else ():
            journal.add(row)
    order = [row_key(key, *size) for key in MODELS for size in sizes()]
    found = [journal.rows[tuple(row.values())] for row in order if row in journal]
    images = {row["images"] for row in found if row["images"]}
    write_results(f"imagenet-{args.limit or 'all'}", with_shares(found), note(args, images))


def parsed() -> argparse.Namespace:
    """The options."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="folder with train/ and val/ of ImageNet")
    arguments.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS], help="default: all")
    arguments.add_argument("--weights", type=Path, help="folder of ARCHITECTURE.safetensors, in place of the hub")
    arguments.add_argument("--limit", type=int, help="validation images, spread over the classes (default: all)")
    arguments.add_argument("--calibration", type=int, default=1000, help="training images (default: %(default)s)")
    arguments.add_argument("--bank", type=int, help="training images that may be neighbours (default: all)")
    arguments.add_argument("--class-map", type=Path, help="class folders in the order of the head, if not sorted")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=0, help="processes that read images")
    arguments.add_argument("--device", default="auto")
    arguments.add_argument("--work", type=Path, default=WORK / "imagenet", help="where networks and rows are kept")
    return arguments.parse_args()


def sizes() -> Iterator[tuple[str, str]]:
    """List and size of every row of a model, the dense one first."""
    yield "-", "12/12"
    yield from ((axes, f"{n}/12") for axes in LISTS.values() for n in TWELFTHS)


def row_key(model: str, axes: str, size: str) -> Row:
    """What tells a row from others of the table."""
    return {"model": MODELS[model].title, "list": axes, "size": size}


def rows_of(args: argparse.Namespace, device: torch.device, key: str, left: list[tuple[str, str]]) -> Iterator[Row]:
    """The rows of a model that are missing."""
    model = MODELS[key]
    net = network(args, device, key)
    read = functools.partial(images, args, net.data_config, net)
    validation, bank = read("val", args.limit), read("train", args.bank) if model.knn else None
    for axes, size in left:
        try:
            spec = net.resolve(None if axes == "-" else net.spec(macs=share(size), axes=axes_of(axes)))
        except BudgetError:
            yield row_key(key, axes, size) | dict.fromkeys(("top-1", "images", *costs(net, None)), "")
            continue
        found = measured(net, spec, validation, bank)
        yield row_key(key, axes, size) | {"top-1": found.top1, "images": found.n} | costs(net, spec)


def measured(net: stratavit.SuperNet, spec: Any, validation: Iterable[Any], bank: Iterable[Any] | None) -> Metrics:
    """Accuracy at a size, by the head or by neighbours of the bank."""
    return stratavit.evaluate(net, validation, spec) if bank is None else stratavit.knn(net, bank, validation, spec)


def costs(net: stratavit.SuperNet, spec: Any) -> Row:
    """Both counts of MACs, and parameters."""
    linear, both = net.macs(spec), net.macs(spec, attention=True)
    return {
        "linear MACs, G": round(linear / 1e9, 3),
        "of dense": round(linear / net.macs(), 3),
        "all MACs, G": round(both / 1e9, 3),
        "all, of dense": round(both / net.macs(attention=True), 3),
        "params, M": round(net.params(spec) / 1e6, 2),
    }


def network(args: argparse.Namespace, device: torch.device, key: str) -> stratavit.SuperNet:
    """A model's super-network with both lists, made once."""
    folder = args.work / f"{key}-{args.calibration}"
    if not folder.exists():
        net = stratavit.SuperNet(source(MODELS[key], args.weights, device), data_config(MODELS[key]))
        calibration = list(images(args, net.data_config, net, "train", args.calibration))
        net.contract(calibration).stratify(calibration, axes=("width", "tokens"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        net.save(folder)
    return stratavit.SuperNet.load(folder, device)


def source(model: Model, weights: Path | None, device: torch.device) -> nn.Module:
    """The dense model at 224 pixels, with weights of a folder or of the hub."""
    file = weights / f"{model.architecture}.safetensors" if weights else None
    dense = dense_model(model.name if file is None else model.architecture, file)
    if model.knn:
        dense.set_input_size(224)
    return dense.to(device)


def data_config(model: Model) -> dict[str, Any] | None:
    """How images are prepared, where it is not as the weights say: DINOv2's k-NN reads 224 pixels out of 256."""
    return {"input_size": (3, 224, 224), "crop_pct": 0.875} if model.knn else None


def images(args: argparse.Namespace, config: Any, model: Any, split: str, limit: int | None) -> ImageLoader:
    """Images of a split of ImageNet."""
    classes = model.model.num_classes if isinstance(model, stratavit.SuperNet) else model.num_classes
    options = (args.class_map, args.batch_size, args.workers, limit)
    return image_loader(args.data, config, split, classes, *options)


def share(size: str) -> float:
    """6/12 as a number."""
    return int(size.partition("/")[0]) / 12


def axes_of(title: str) -> str:
    """The option that a list's title stands for."""
    return next(axes for axes, found in LISTS.items() if found == title)


def with_shares(rows: list[Row]) -> list[Row]:
    """The rows with the share of the dense model's accuracy that each keeps, in percent, after its top-1."""
    dense = {row["model"]: row["top-1"] for row in rows if row["size"] == "12/12"}
    made = []
    for row in rows:
        top1, whole = row["top-1"], dense.get(row["model"])
        kept = round(100 * top1 / whole, 1) if whole and top1 != "" else ""
        first = {name: row[name] for name in ("model", "list", "size")}
        first |= {"kept of dense, %": kept, "top-1, %": "out of reach" if top1 == "" else round(top1, 2)}
        made.append(first | {name: value for name, value in row.items() if name not in (*first, "top-1")})
    return made


def note(args: argparse.Namespace, counts: set[int]) -> str:
    """What was measured on what; the words ImageNet accuracy for all images only."""
    what = (
        "ImageNet accuracy, all 50,000 validation images"
        if counts == {FULL}
        else (f"Accuracy on {', '.join(map(str, sorted(counts)))} validation images; this is not ImageNet accuracy")
    )
    bank = "all" if args.bank is None else f"{args.bank:,}"
    return (
        f"{what}. Calibrated on {args.calibration:,} training images, nothing trained. Kept: top-1 over that of the "
        f"dense model on the same images. k-NN: 20 neighbours among {bank} training images, temperature 0.07. Sizes: "
        "at most this share of the linear MACs; all MACs count QK^T and AV, too."
    )


def estimate(args: argparse.Namespace, device: torch.device, missing: dict[str, list[tuple[str, str]]]) -> None:
    """Prints how long the missing rows will take, from images per second measured now."""
    total = 0.0
    for key, left in missing.items():
        model = MODELS[key]
        if not left:
            print(f"{model.title}: all rows are there")
            continue
        dense = timm.create_model(model.architecture, **({"img_size": 224} if model.knn else {})).eval().to(device)
        config = resolve_data_config(dense) | (data_config(model) or {})
        loader = images(args, config, dense, "val", args.limit)
        count = len(loader.chosen) + (len(images(args, config, dense, "train", args.bank).chosen) if model.knn else 0)
        compute, reading = seconds_of_pass(dense, args.batch_size), seconds_to_read(loader)
        passes = [compute * share(size) for _, size in left]
        seconds = count * sum(max(one, reading) if args.workers else one + reading for one in passes)
        if not (args.work / f"{key}-{args.calibration}").exists():
            seconds += args.calibration * (reading + CONVERT * compute)
        total += seconds
        print(
            f"{model.title}: {len(left)} rows of {count:,} images, about {duration(seconds)} "
            f"({1 / compute:.0f} images/s dense, {1 / reading:.0f} read)"
        )
    print(f"expected run time: {duration(total)}", flush=True)


def duration(seconds: float) -> str:
    """In hours, minutes or seconds."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


@torch.inference_mode()
def seconds_of_pass(model: nn.Module, batch_size: int) -> float:
    """Of the dense model, per image; the second of two batches."""
    batch = torch.randn(batch_size, 3, 224, 224, device=next(model.parameters()).device)
    for _ in range(2):
        start = time.perf_counter()
        model(batch).sum().item()  # waits for the device
    return (time.perf_counter() - start) / batch_size


def seconds_to_read(loader: ImageLoader) -> float:
    """Per image, over a few batches; without the first if there are more, as it waits for the workers to start."""
    counts, start, since = [], time.perf_counter(), 0.0
    for batch, _ in loader:
        counts.append(len(batch))
        since = since or time.perf_counter()
        if len(counts) == 4:
            break
    loader.close()
    end = time.perf_counter()
    return (end - since) / sum(counts[1:]) if len(counts) > 1 else (end - start) / sum(counts)


if __name__ == "__main__":
    main()
