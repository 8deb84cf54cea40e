"""The main job end to end in a minute or two: real images from scikit-learn's wheel, no network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stratavit.artifacts import sub_network
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.accuracy import evaluate
from stratavit.files.folders import write_folder
from stratavit.reports import curve, plots
from stratavit.reports.html import write_report
from stratavit.supernet import SuperNet
from stratavit.utils.progress import track

PAGE, TITLE = "report.html", "a small ViT on 8 x 8 digits, one training, every size"
DATA_CONFIG: dict[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (0.305,),
    "std": (0.376,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 hand-written digits of 8 x 8 pixels, normalised: four fifths to train on, one fifth to test on.

    Raises:
        StrataViTError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise StrataViTError("the demo's images come with scikit-learn: pip install 'stratavit[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = (images - DATA_CONFIG["mean"][0]) / DATA_CONFIG["std"][0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order.chunk(5)[0], torch.cat(order.chunk(5)[1:])
    targets = torch.tensor(labels)
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])


def small_vit() -> VisionTransformer:
    """A ViT for 8 x 8 images: 16 patches, width 96, 4 blocks, 3 heads of 32.

    timm's initial weights suit wide models and long training; Xavier's learn digits in seconds.
    """
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter)
    torch.nn.init.normal_(model.pos_embed, std=0.3)
    return model


def train(model: VisionTransformer, data: TensorDataset, epochs: int, device: torch.device) -> None:
    """Plain training: AdamW, one cosine cycle, images shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=64, shuffle=True, generator=generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=epochs * len(loader))
    model.to(device).train()
    for _ in track(range(epochs), "train a small ViT"):
        for images, labels in loader:
            loss = F.cross_entropy(model(shifted(images, generator).to(device)), labels.to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves a batch ``[B, 1, 8, 8]`` by -1, 0 or 1 pixels each way."""
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), value=float(images.min()))[:, :, dy : dy + 8, dx : dx + 8]


def run(out: Path, device: torch.device, epochs: int, overwrite: bool) -> tuple[dict[str, Any], list[Any]]:
    """Trains, converts, measures, extracts, saves, loads back and compares; everything lands in `out`.

    Raises:
        StrataViTError: `out` is taken, or the loaded model disagrees with the saved one.
    """
    done: list[tuple[dict[str, Any], list[Any]]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that threads would only wait for each other
    try:
        write_folder(out, lambda folder: done.append(_work(folder, out, device, epochs)), overwrite)
    finally:
        torch.set_num_threads(threads)
    result, lines = done[0]
    where = f"everything is in {out}: super-network/, small/, curve.csv, curve.png; open {out / PAGE}"
    return {**result, "folder": str(out)}, [*lines, where]


def _work(folder: Path, out: Path, device: torch.device, epochs: int) -> tuple[dict[str, Any], list[Any]]:
    started = time.perf_counter()
    torch.manual_seed(0)
    train_data, test_data = digits()
    calibration, test = DataLoader(train_data, batch_size=256), DataLoader(test_data, batch_size=256)
    model = small_vit()
    train(model, train_data, epochs, device)

    net = SuperNet(model, DATA_CONFIG)
    net.contract(calibration).stratify(calibration)
    net.provenance["source"] = {"model": "small ViT trained on scikit-learn's digits", "weights": None}
    points = curve.curve(net, test)
    curve_points.write_csv(points, folder / "curve.csv")
    plots.plot(points, folder / "curve.png", TITLE)

    met = net.budget(macs=0.5)
    small = net.extract(spec=met.spec)
    net.save(folder / "super-network")
    sub_network.save(small, folder / "small")
    write_report(net, folder / PAGE, points, TITLE, run=str(out / "super-network"))
    loaded = sub_network.load(folder / "small", device)
    images = next(iter(test))[0].to(device)
    with torch.inference_mode():
        difference = float((loaded(images) - net(images, met.spec)).abs().max())
    if difference > 1e-5:  # pragma: no cover: a fault of ours, if there ever is one
        raise StrataViTError(
            f"the loaded model differs from the super-network's by {difference:.2e}; please report this"
        )
    metrics = evaluate(loaded, test)
    result = {
        "points": [vars(point) for point in points],
        "half": metrics.to_dict(),
        "budget": {"asked": met.asked, "got": met.got, "reachable": [met.low, met.high]},
        "difference": difference,
        "seconds": time.perf_counter() - started,
    }
    lines = [
        curve.table(points),
        str(met),
        f"half-size model, saved and loaded back: {metrics}; largest logit difference {difference:.1e}",
        f"done in {result['seconds']:.0f} s",
    ]
    return result, lines
