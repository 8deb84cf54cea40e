"""The command ``report``: a super-network as one HTML page."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import cast, get_args

from stratavit.cli.arguments import positive
from stratavit.cli.measure import measured
from stratavit.cli.options import Outcome
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.latency import Precision, Runtime, Setting
from stratavit.files.folders import check_free_file
from stratavit.reports.html import write_report
from stratavit.supernet import SuperNet
from stratavit.utils.devices import pick_device


def add_report_options(command: ArgumentParser) -> None:
    """What only this command takes."""
    command.add_argument("--curve", metavar="DIR", help="accuracy from a folder written by curve, in place of --data")
    command.add_argument("--title", metavar="TEXT", help="of the page (default: source and method)")
    group = command.add_argument_group("latency of the points, on this device")
    group.add_argument("--latency", action="store_true", help="time them, and offer milliseconds as an axis")
    group.add_argument(
        "--latency-batch", type=positive, default=1, metavar="N", help="images per timed batch (default: %(default)s)"
    )
    group.add_argument("--runtime", choices=get_args(Runtime), default="eager", help="(default: %(default)s)")
    group.add_argument("--dtype", choices=get_args(Precision), help="of weights (default: as saved)")
    group.add_argument("--threads", type=positive, default=0, help="CPU threads (default: torch's own)")


def report_page(args: Namespace) -> Outcome:
    """RUN, and its accuracy if it is given or can be measured, to one HTML page."""
    out = args.out or f"{str(args.run).rstrip('/')}-report.html"
    check_free_file(out, args.overwrite)
    if args.curve is not None and args.data is not None:
        raise StrataViTError("--curve and --data are two ways to the same accuracies; give one of them")
    if args.data is None and (args.knn is not None or args.zero_shot is not None):
        raise StrataViTError("--knn and --zero-shot say how images are measured; give --data, too")
    if args.latency and args.curve is None and args.data is None:
        raise StrataViTError("--latency times the points of the curve; give --curve or --data, too")
    setting = None
    if args.latency:
        setting = Setting(args.latency_batch, cast(Runtime, args.runtime), args.dtype, args.threads)
    net = SuperNet.load(args.run, pick_device(args.device))
    points = [] if args.curve is None else curve_points.points_in(args.curve)
    if args.data is not None:
        points = measured(args, net)
    file = write_report(net, out, points, args.title, args.overwrite, latency=setting, run=str(args.run))
    assert net.strata is not None
    size, sizes = file.stat().st_size, len(net.strata) + 1
    text = f"wrote {file} ({size / 2**10:.0f} KiB): {sizes} sizes"
    text += f", {len(points)} of them measured" if points else "; --curve DIR or --data DIR adds accuracy"
    return {"file": str(file), "bytes": size, "sizes": sizes, "points": len(points)}, [text]
