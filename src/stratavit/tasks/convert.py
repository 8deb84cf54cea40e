"""From a pre-trained model and images to a super-network, or to one small model, in one call."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from stratavit.artifacts.model_loading import model_at
from stratavit.budgets.constraints import BudgetArgs, check_budgets
from stratavit.calibration.contraction import Method, resolve_method
from stratavit.calibration.objectives import Objective
from stratavit.calibration.wpac import Criterion
from stratavit.choices import ListAxes, SumsPlace, Units
from stratavit.data.class_names import all_named, class_names_of, full_names, set_class_names
from stratavit.data.image_files import class_folders
from stratavit.data.image_folder import ImageLoader, image_loader
from stratavit.data.shared_images import report_shared_images
from stratavit.data.splits import split_folder
from stratavit.data.unlabelled import Images, UnlabelledLoader, check_there, opened
from stratavit.dropout_list.build import list_work
from stratavit.dropout_list.floors import MinWidth, with_floors
from stratavit.dropout_list.joint import token_search
from stratavit.errors import StrataViTError
from stratavit.evaluation.dense_check import DenseCheck, check_dense
from stratavit.evaluation.latency import Setting
from stratavit.supernet import SuperNet
from stratavit.tasks.convert_options import LIMIT, Options, Price
from stratavit.utils.devices import pick_device
from stratavit.utils.model import classes_of
from stratavit.utils.progress import overall, say
from stratavit.utils.text import human

LABELLED = ("label", "cross_entropy")  # objectives that need labels


@dataclass(frozen=True)
class Conversion:
    """A super-network, and how it was made.

    Attributes:
        net: With its dropout list.
        name: Of the source.
        images: That it was calibrated on.
        unreadable: Images that were left out.
        seconds: Of calibration.
        check: Of the dense model; None where there are no labels.
    """

    net: SuperNet
    name: str
    images: int
    unreadable: int
    seconds: float
    check: DenseCheck | None

    @property
    def smallest_macs(self) -> int:
        """Of the smallest size on the list."""
        assert self.net.strata is not None
        return self.net.macs(self.net.strata.smallest())

    def __str__(self) -> str:
        return (
            f"{self.name}: calibrated on {self.images} images in {self.seconds:.0f} s; any size from "
            f"{human(self.smallest_macs)} to {human(self.net.macs())} MACs is now a slice"
        )


def convert(
    model: nn.Module | str | Path,
    images: Images,
    *,
    method: Method | None = None,
    criterion: Criterion | None = None,
    objective: Objective = "auto",
    memory: SumsPlace = "auto",
    axes: ListAxes = "width",
    merging_places: int | None = None,
    price: Price = "macs",
    units: Units | None = None,
    ignore: Sequence[str] | None = None,
    min_width: MinWidth | None = None,
    setting: Setting | None = None,
    limit: int = LIMIT,
    seed: int = 0,
    class_map: str | Path | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    embedding: bool | None = None,
    whole_heads: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> SuperNet:
    """Makes a super-network from a pre-trained model and images, as the command ``convert`` does; no training.

    It is ``SuperNet(model).contract(...).stratify(...)`` on images in any form. Labels are used where the folders of
    a folder are as many as the model's classes or have their names, where a loader gives them, and where the objective
    needs them; the dense model's accuracy is checked where labels come from folders.

    Args:
        model: Of timm, transformers or torchvision, which is copied; or a name or a folder, see `dense_model`.
        images: A folder, in which images may lie anywhere (below ``train/``, if there is one); a ``.tar`` file, or a
            folder of them (shards of a webdataset); ``hfds/NAME``, a data set that Hugging Face's datasets loads; a
            list of paths of any of these; a data set of torch or datasets, or a list, of pictures or samples such as
            ``{"image": picture, "label": 3}``; or a loader of such samples, of batches of these, or of batches of
            prepared tensors as `SuperNet.contract` reads, whose images are held in memory.
        method, criterion, objective, seed, memory: See `SuperNet.contract`.
        axes: ``both`` makes a second list that merges similar tokens, too.
        merging_places, price, units, ignore, min_width, setting: See `SuperNet.stratify`.
        limit: At most this many images, evenly spread; of a loader the first.
        class_map: Text file with one class folder name per line in the order of the head.
        weights, num_classes: See `dense_model`; for a name.
        embedding, whole_heads: See `SuperNet`.
        batch_size, workers: Images of a batch, and processes that read files.
        device: Where to; None is the device of `model`, and for a name the best available.
        verbose: Show progress, and print what was read, got and is reachable to standard error.

    Returns:
        The super-network, with its dropout list.

    Raises:
        StrataViTError: There are no images, or they, the model or an option do not fit.
        UnsupportedModelError: The model cannot be cut.
    """
    options = Options(
        method=method,
        criterion=criterion,
        objective=objective,
        memory=memory,
        axes=axes,
        merging_places=merging_places,
        price=price,
        units=units,
        ignore=ignore,
        min_width=min_width,
        setting=setting,
        limit=limit,
        seed=seed,
        class_map=class_map,
        weights=weights,
        num_classes=num_classes,
        embedding=embedding,
        whole_heads=whole_heads,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    with nullcontext() if verbose else overall("convert", 1, silent=True):
        made = converted(model, images, options)
        say(str(made) if made.check is None else f"{made.check}\n{made}")
    return made.net


def compress(
    model: nn.Module | str | Path,
    images: Images,
    *,
    method: Method | None = None,
    limit: int = LIMIT,
    device: torch.device | str | None = None,
    verbose: bool = True,
    **asked: Unpack[BudgetArgs],
) -> nn.Module:
    """Makes one small model within a budget from a pre-trained model and images; no training.

    It is `convert` and `SuperNet.extract`. Keep the super-network of `convert` to make several sizes.

    Args:
        model, images, method, limit, device: See `convert`.
        verbose: Show progress, and print what was asked, got and is reachable to standard error.
        **asked: Budgets, such as ``macs=0.5``, see `SuperNet.budget`. ``axes="both"`` merges similar tokens, too.

    Returns:
        A plain small model in eval mode, of the library that `model` is of.

    Raises:
        BudgetError: No budget, an unreadable one, or one that cannot be reached.
        StrataViTError, UnsupportedModelError: See `convert`.
    """
    check_budgets(asked)
    axes: ListAxes = "both" if asked.get("axes") == "both" else "width"
    net = convert(model, images, method=method, axes=axes, limit=limit, device=device, verbose=verbose)
    return net.extract(verbose=verbose, **asked)


def converted(model: nn.Module | str | Path, images: Images, options: Options, name: str | None = None) -> Conversion:
    """The work of `convert`, also for errors; `name` is what the user calls the model, if not `model`."""
    options.check()
    check_there(images)
    named = isinstance(model, str | Path)
    name = name or (str(model) if named else type(model).__name__)
    source = _source_model(model, options)
    origin = _source(name, options, source) if named else None
    net = SuperNet(source, embedding=options.embedding or None, whole_heads=options.whole_heads)
    del source  # so that a device holds the weights once
    if not named and options.device is not None:
        net.to(pick_device(str(options.device)))
    method, _ = resolve_method(options.method, options.criterion)
    asked: Any = {"axes": ("width", "tokens") if options.axes == "both" else ("width",)}
    kept: Any = {"ignore": options.ignore, "min_width": options.min_width}
    places = with_floors(net.cost, **kept).places
    asked["merging_places"] = options.merging_places
    tokens = token_search(asked["axes"], method, net.model, places, options.merging_places)  # refused before any work
    loader, reader = _loader(net, images, options)
    check = _looked_at(net, images, reader, labelled=loader is reader)
    asked |= kept | {key: getattr(options, key) for key in ("objective", "seed", "price", "setting", "units")}
    count = len(reader.chosen) if reader is not None else sum(len(batch) for batch, _ in loader)
    started = time.perf_counter()
    with overall("convert", count + sum(list_work(method, tokens=tokens, images=count))) as begin:
        begin(count)
        how = {key: getattr(options, key) for key in ("method", "criterion", "objective", "seed", "memory")}
        net.contract(loader, **how)
        net.stratify(loader, **asked)
    seconds = time.perf_counter() - started
    if reader is not None:
        reader.close()
    if origin is not None:
        net.provenance["source"] = origin
    unreadable = 0 if reader is None else len(reader.unreadable)
    return Conversion(net, name, net.provenance["contract"]["images"], unreadable, seconds, check)


def _source_model(model: nn.Module | str | Path, options: Options) -> Any:
    if isinstance(model, str | Path):
        device = pick_device("auto" if options.device is None else str(options.device))
        return model_at(str(model), options.weights, options.num_classes, device)
    if options.weights is not None or options.num_classes is not None:
        raise StrataViTError("weights and num_classes go with the name of a model; leave them out for a model")
    return model


def _source(name: str, options: Options, model: Any) -> dict[str, Any]:
    """What a super-network is made from; its repository on the hub, if its weights came from there or are called so."""
    weights = None if options.weights is None else Path(options.weights).name
    hub_id = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    known = weights is None or "." in name or weights.startswith(name)
    return {"model": name, "weights": weights, **({"base_model": hub_id} if hub_id and known else {})}


def _loader(net: SuperNet, images: Images, options: Options) -> tuple[Iterable[Any], ImageLoader | None]:
    """Batches for `contract` and `stratify`, and what reads files, if something does; the same if it reads labels."""
    folder = isinstance(images, str | Path) and Path(images).is_dir()
    why = _why_no_labels(net, Path(images), options) if folder else None  # type: ignore[arg-type]
    if folder and why is None:
        names, classes = class_names_of(net), classes_of(net)
        how = (options.class_map, options.batch_size, options.workers, options.limit, names)
        reader = image_loader(images, net.data_config, "train", classes, *how)  # type: ignore[arg-type]
        return reader, reader
    if options.class_map is not None:
        raise StrataViTError("class_map: numbers class folders, and the images are in no folder; leave it out")
    loader = opened(images, net.data_config, options.limit, options.batch_size, options.workers)
    if not isinstance(loader, UnlabelledLoader):
        return list(loader), None
    listing, count = loader.loader.dataset.listing, len(loader.loader.dataset)
    place = images if isinstance(images, str | Path) else f"the {type(images).__name__}"
    say(f"data: {place}: {count} images, used without labels{why or ''}; the dense model's accuracy is not checked")
    for note in listing.notes() if folder else []:
        say(f"data: {note}")
    return loader, loader.loader


def _why_no_labels(net: SuperNet, folder: Path, options: Options) -> str | None:
    """Why the folders of a folder are not taken for classes; None if they are, or must be."""
    if options.class_map is not None or options.objective in LABELLED:
        return None
    classes, found = classes_of(net), class_folders(split_folder(folder, "train"))
    if not classes:
        return " (the model outputs features)"
    if len(found) == classes or all_named(folder, found, class_names_of(net)):
        return None
    return f" (folders with images: {len(found)}, the model's classes: {classes})"


def _looked_at(net: SuperNet, images: Images, reader: ImageLoader | None, labelled: bool) -> DenseCheck | None:
    """Looks at images and dense model before the work; the classes get names if nothing speaks against them."""
    if reader is not None and isinstance(images, str | Path):
        report_shared_images(reader, images, "val")
    check = check_dense(net, reader, net.data_config) if labelled and reader is not None else None
    if check is None or reader is None:
        return None
    if check.doubt:
        print(f"data: warning: {check}; {check.doubt}", file=sys.stderr)
    if check.numbered:
        set_class_names(net, full_names(reader.class_names, class_names_of(net)))
    net.provenance["dense"] = check.to_dict()
    return check
