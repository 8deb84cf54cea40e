"""The command ``convert``: a pre-trained model and images to a super-network."""

from __future__ import annotations

from argparse import Namespace

from stratavit.artifacts import folder_format
from stratavit.cli.checks import check_inputs, check_model, check_typed
from stratavit.cli.options import Outcome
from stratavit.cli.targets import model_named
from stratavit.data.class_names import class_names_of
from stratavit.data.unlabelled import check_there
from stratavit.dropout_list.floors import floors_of
from stratavit.evaluation.latency import Setting
from stratavit.files.folders import check_free
from stratavit.tasks.convert import converted
from stratavit.tasks.convert_options import Options


def convert(args: Namespace) -> Outcome:
    """MODEL and calibration images to a super-network folder."""
    options = Options(
        method=args.method,
        criterion=args.criterion,
        objective=args.objective,
        memory=args.memory,
        axes=args.axes,
        merging_places=args.merging_places,
        price=args.price,
        units=args.units,
        ignore=args.ignore,
        min_width=args.min_width and dict(args.min_width),
        setting=Setting(args.latency_batch, threads=args.threads),
        limit=args.images,
        seed=args.seed,
        class_map=args.class_map,
        weights=args.weights,
        num_classes=args.num_classes,
        embedding=args.embedding,
        whole_heads=args.whole_heads,
        batch_size=args.batch_size,
        workers=max(args.workers, 0),
        device=args.device,
    )
    options.check()
    check_typed(args)
    check_model(args.model)
    check_inputs(args)
    check_there(args.data)
    check_free(args.out, args.overwrite)
    made = converted(model_named(args.model), args.data, options, args.model)
    net = made.net
    net.save(args.out, args.overwrite, moments=not args.no_moments)
    assert net.strata is not None
    moments, floors = folder_format.moments_bytes(args.out), floors_of((*net.sites, *net.cost.places))
    result = {
        "run": str(args.out),
        "images": made.images,
        "unreadable": made.unreadable,
        "seconds": made.seconds,
        "macs": net.macs(),
        "params": net.params(),
        "smallest_macs": made.smallest_macs,
        "entries": len(net.strata),
        "floors": floors,
        "moments_bytes": moments,
        "dense": None if made.check is None else made.check.to_dict(),
        "classes_named": class_names_of(net) is not None,
    }
    text = f"{made} of {args.out} ({moments / 2**20:.3g} MiB of it are moments)"
    if floors:
        text += f"; {len(floors)} sites keep what --ignore and --min-width ask for"
    return result, [text] if made.check is None else [str(made.check), text]
