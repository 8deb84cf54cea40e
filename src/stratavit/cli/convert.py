"""The command ``convert``: a pre-trained model and images to a super-network."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from stratavit.artifacts import folder_format
from stratavit.artifacts.model_loading import model_at
from stratavit.calibration.contraction import resolve_method
from stratavit.cli import options
from stratavit.cli.checks import check_inputs, check_model, check_typed
from stratavit.cli.options import Outcome
from stratavit.cli.targets import model_named
from stratavit.data.class_names import class_names_of, full_names, set_class_names
from stratavit.data.image_folder import ImageLoader
from stratavit.data.shared_images import report_shared_images
from stratavit.dropout_list.build import list_work
from stratavit.dropout_list.floors import floors_of, with_floors
from stratavit.dropout_list.joint import token_search
from stratavit.evaluation.dense_check import DenseCheck, check_dense
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device
from stratavit.utils.progress import overall
from stratavit.utils.text import human


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    method, _ = resolve_method(args.method, args.criterion)
    check_typed(args)
    check_model(args.model)
    check_inputs(args, "train")
    check_free(args.out, args.overwrite)
    device = pick_device(args.device)
    model: Any = model_at(model_named(args.model), args.weights, args.num_classes, device)
    net = SuperNet(model, embedding=args.embedding or None)
    axes = ("width", "tokens") if args.axes == "both" else ("width",)
    kept: dict[str, Any] = {"ignore": args.ignore, "min_width": args.min_width and dict(args.min_width)}
    tokens = token_search(axes, method, net.model, with_floors(net.cost, **kept).places)  # refused before any work
    loader = options.loader_of(args, net.data_config, "train", net, args.images)
    check = _looked_at(args, net, loader)
    started = time.perf_counter()
    setting, images = Setting(args.latency_batch, threads=args.threads), len(loader.chosen)
    asked: dict[str, Any] = {"objective": args.objective, "seed": args.seed, "price": args.price, "axes": axes}
    with overall("convert", images + sum(list_work(method, tokens=tokens))) as begin:
        begin(images)
        net.contract(loader, args.method, args.criterion, args.objective, args.seed)
        net.stratify(loader, setting=setting, **asked, **kept)
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
        "floors": floors_of((*net.sites, *net.cost.places)),
        "moments_bytes": folder_format.moments_bytes(args.out),
        "dense": None if check is None else check.to_dict(),
        "classes_named": class_names_of(net) is not None,
    }
    text = (
        f"{args.model}: calibrated on {result['images']} images in {seconds:.0f} s; "
        f"any size from {human(result['smallest_macs'])} to {human(net.macs())} MACs is now a slice of {args.out} "
        f"({result['moments_bytes'] / 2**20:.3g} MiB of it are moments)"
        + (f"; {len(result['floors'])} sites keep what --ignore and --min-width ask for" if result["floors"] else "")
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
