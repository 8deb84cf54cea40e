"""The command ``convert``: a pre-trained model to a super-network."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.calibration.objectives import OBJECTIVES
from stratavit.calibration.wpac import CRITERIA
from stratavit.cli.arguments import positive
from stratavit.cli.options import Outcome, loader_of
from stratavit.data.class_names import class_names_of
from stratavit.data.splits import split_folder
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of
from stratavit.utils.text import human


def add_convert_options(command: ArgumentParser) -> None:
    """What only this command takes."""
    command.add_argument(
        "--images",
        type=positive,
        default=1024,
        help="calibration images at most (default: %(default)s, as in the paper)",
    )
    command.add_argument(
        "--method",
        choices=("default", "paper"),
        help="paper: exactly the paper, cut channels count as zero (default: predicted from those kept)",
    )
    command.add_argument(
        "--criterion", choices=CRITERIA, help="what channels are sorted by; all but output imply --method paper"
    )
    command.add_argument(
        "--no-moments",
        action="store_true",
        help="leave the second moments out of RUN: a smaller folder, less accurate sub-networks",
    )
    command.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="auto",
        help="what is differentiated; 'sampled', 'prediction' and 'feature' need no labels (default: %(default)s)",
    )
    command.add_argument(
        "--price",
        choices=("macs", "latency"),
        default="macs",
        help="what the list weighs a unit's importance against (default: %(default)s)",
    )
    command.add_argument(
        "--latency-batch", type=positive, default=1, metavar="N", help="images per timed batch (default: %(default)s)"
    )
    command.add_argument("--threads", type=positive, default=0, help="CPU threads of timings (default: torch's own)")
    command.add_argument("--seed", type=int, default=0, help="for random choices (default: %(default)s)")
    command.add_argument(
        "--embedding",
        action="store_true",
        help="the head leads into an embedding (a CLIP image tower), it does not tell classes apart",
    )


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    check_free(args.out, args.overwrite)
    split_folder(args.data, "train")
    device = pick_device(args.device)
    net = SuperNet(model_at(args.model, args.weights, args.num_classes, device), embedding=args.embedding or None)
    loader = loader_of(args, net.data_config, "train", classes_of(net), args.images, class_names_of(net))
    started = time.perf_counter()
    net.contract(loader, args.method, args.criterion, args.objective, args.seed)
    setting = Setting(args.latency_batch, threads=args.threads)
    net.stratify(loader, objective=args.objective, seed=args.seed, price=args.price, setting=setting)
    seconds = time.perf_counter() - started
    net.provenance["source"] = {
        "model": args.model,
        "weights": None if args.weights is None else Path(args.weights).name,
    }
    net.save(args.out, args.overwrite, moments=not args.no_moments)
    assert net.strata is not None
    smallest = net.strata.smallest()
    result = {
        "run": str(args.out),
        "images": net.provenance["contract"]["images"],
        "unreadable": len(loader.unreadable),
        "seconds": seconds,
        "macs": net.macs(),
        "params": net.params(),
        "smallest_macs": net.macs(smallest),
        "entries": len(net.strata),
        "moments_bytes": folder_format.moments_bytes(args.out),
    }
    text = (
        f"{args.model}: calibrated on {result['images']} images in {seconds:.0f} s; "
        f"any size from {human(net.macs(smallest))} to {human(net.macs())} MACs is now a slice of {args.out} "
        f"({result['moments_bytes'] / 2**20:.3g} MiB of it are moments)"
    )
    return result, [text]
