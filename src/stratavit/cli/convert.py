"""The command ``convert``: a pre-trained model and images to a super-network."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.calibration.contraction import resolve_method
from stratavit.calibration.objectives import OBJECTIVES
from stratavit.calibration.wpac import CRITERIA
from stratavit.cli import options
from stratavit.cli.options import Outcome, positive
from stratavit.data.class_names import class_names_of, full_names, set_class_names
from stratavit.data.image_folder import ImageLoader
from stratavit.data.shared_images import report_shared_images
from stratavit.data.splits import split_folder
from stratavit.dropout_list.joint import token_search
from stratavit.evaluation.dense_check import DenseCheck, check_dense
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.text import human


def convert_options(command: ArgumentParser) -> None:
    """MODEL, images, and how knowledge is sorted."""
    add = command.add_argument
    add(
        "model",
        metavar="MODEL|FOLDER",
        help="a name in timm (deit_tiny_patch16_224) or torchvision (vit_b_16), or the folder of a small model or of a "
        "model of transformers",
    )
    options.add_model(command)
    options.add_data(command, "images to calibrate on: a folder with train/, or the class folders themselves")
    options.add_out(command, "RUN", "folder to write the super-network to")
    text = "maximum number of calibration images (default: %(default)s, as in the paper)"
    add("--images", type=positive, default=1024, help=text)
    text = "paper: cut channels count as zero, as in the paper; default: they are predicted from the kept ones"
    add("--method", choices=("default", "paper"), help=text)
    text = "how channels are ranked; all but output imply --method paper"
    add("--criterion", choices=CRITERIA, help=text)
    text = "do not save second moments in RUN: a smaller folder, less accurate sub-networks"
    add("--no-moments", action="store_true", help=text)
    text = "quantity to differentiate; sampled, prediction and feature need no labels (default: %(default)s)"
    add("--objective", choices=OBJECTIVES, default="auto", help=text)
    text = "cost by which a unit's importance is divided (default: %(default)s)"
    add("--price", choices=("macs", "latency"), default="macs", help=text)
    text = "both: make a second list that merges similar tokens, too (default: %(default)s)"
    add("--axes", choices=("width", "both"), default="width", help=text)
    options.add_latency_batch(command)
    add("--threads", type=positive, default=0, help="CPU threads for timings (default: torch's setting)")
    add("--seed", type=int, default=0, help="seed of random choices (default: %(default)s)")
    text = "the head outputs an embedding (CLIP image towers), not classes"
    add("--embedding", action="store_true", help=text)


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    check_free(args.out, args.overwrite)
    split_folder(args.data, "train")
    device = pick_device(args.device)
    model: Any = model_at(args.model, args.weights, args.num_classes, device)
    net = SuperNet(model, embedding=args.embedding or None)
    method, _ = resolve_method(args.method, args.criterion)
    axes = ("width", "tokens") if args.axes == "both" else ("width",)
    token_search(axes, method, net.model, net.cost.places)  # refused before any work
    loader = options.loader_of(args, net.data_config, "train", net, args.images)
    check = _looked_at(args, net, loader)
    started = time.perf_counter()
    net.contract(loader, args.method, args.criterion, args.objective, args.seed)
    setting = Setting(args.latency_batch, threads=args.threads)
    net.stratify(loader, objective=args.objective, seed=args.seed, price=args.price, setting=setting, axes=axes)
    seconds = time.perf_counter() - started
    net.provenance["source"] = _source(args, model)
    net.save(args.out, args.overwrite, moments=not args.no_moments)
    assert net.strata is not None
    result = {
        "run": str(args.out),
        "images": net.provenance["contract"]["images"],
        "unreadable": len(loader.unreadable),
        "seconds": seconds,
        "macs": net.macs(),
        "params": net.params(),
        "smallest_macs": net.macs(net.strata.smallest()),
        "entries": len(net.strata),
        "moments_bytes": folder_format.moments_bytes(args.out),
        "dense": None if check is None else check.to_dict(),
        "classes_named": class_names_of(net) is not None,
    }
    text = (
        f"{args.model}: calibrated on {result['images']} images in {seconds:.0f} s; "
        f"any size from {human(result['smallest_macs'])} to {human(net.macs())} MACs is now a slice of {args.out} "
        f"({result['moments_bytes'] / 2**20:.3g} MiB of it are moments)"
    )
    return result, [text] if check is None else [str(check), text]


def _source(args: Namespace, model: Any) -> dict[str, Any]:
    """What a super-network is made from; its repository on the hub, if its weights came from there or are called so."""
    weights = None if args.weights is None else Path(args.weights).name
    hub_id = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    known = weights is None or "." in args.model or weights.startswith(args.model)
    return {"model": args.model, "weights": weights, **({"base_model": hub_id} if hub_id and known else {})}


def _looked_at(args: Namespace, net: SuperNet, loader: ImageLoader) -> DenseCheck | None:
    """Looks at images and dense model before the work; the classes get names if nothing speaks against them."""
    report_shared_images(loader, args.data, "val")
    check = check_dense(net, loader, net.data_config)
    if check is None:
        return None
    if check.doubt:
        print(f"data: warning: {check}; {check.doubt}", file=sys.stderr)
    if check.numbered:
        set_class_names(net, full_names(loader.class_names, class_names_of(net)))
    net.provenance["dense"] = check.to_dict()
    return check
