"""Options of the commands; nothing slow is imported, so that ``--help`` and a mistyped option answer at once."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import get_args

from stratavit.choices import (
    CALIBRATED,
    COMPARED,
    CRITERIA,
    MIN_AGREEMENT,
    OBJECTIVES,
    SUFFIXES,
    Axes,
    Precision,
    Runtime,
    SumsPlace,
    Units,
)
from stratavit.cli import options
from stratavit.cli.options import positive

TARGET = "a saved folder, an ONNX or OpenVINO file, a folder of transformers, user/name on the hub, or a name"
RUN, SAVED = "folder of a super-network, or user/name on the hub", "a saved folder, or user/name on the hub"
LABELLED = "labelled images: a folder with val/, or the class folders themselves"


def convert_options(command: ArgumentParser) -> None:
    """MODEL, images, and how knowledge is sorted."""
    add = command.add_argument
    add(
        "model",
        metavar="MODEL|FOLDER",
        help="a name in timm (deit_tiny_patch16_224), also as on the hub (timm/NAME, hf-hub:user/name), or in "
        "torchvision (vit_b_16); or the folder of a small model or of a model of transformers",
    )
    options.add_model(command)
    what = "images, with or without labels: a folder of any form, a .tar file or a folder of them, or hfds/NAME"
    options.add_data(command, what)
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
    text = (
        "where covariances are summed: on the device, or on the host (CPU) batch by batch, for models that a GPU holds "
        "only without them; auto: on the host if half of the free GPU memory is too little (default: %(default)s)"
    )
    add("--memory", choices=get_args(SumsPlace), default="auto", help=text)
    text = "cost by which a unit's importance is divided (default: %(default)s)"
    add("--price", choices=("macs", "latency"), default="macs", help=text)
    text = (
        "gpu: cut head widths in multiples of 32, hidden widths in multiples of 64 or 128; default: of 8, and in 32 "
        "groups (default: gpu with --price latency on a GPU)"
    )
    add("--units", choices=get_args(Units), help=text)
    text = "both: make a second list that merges similar tokens, too (default: %(default)s)"
    add("--axes", choices=("width", "both"), default="width", help=text)
    text = "blocks that merge tokens (default: five of twelve; with --price latency as many as measured time allows)"
    add("--merging-places", type=positive, metavar="N", help=text)
    options.add_floors(command)
    options.add_latency_batch(command)
    add("--threads", type=positive, default=0, help="CPU threads for timings (default: torch's setting)")
    add("--seed", type=int, default=0, help="seed of random choices (default: %(default)s)")
    text = "plain attention loses whole heads, not coordinates of all heads; for GPUs that gain more from these"
    add("--whole-heads", action="store_true", help=text)
    text = "the head outputs an embedding (CLIP image towers), not classes"
    add("--embedding", action="store_true", help=text)


def extract_options(command: ArgumentParser) -> None:
    """RUN and budgets."""
    command.add_argument("run", metavar="RUN", help=RUN)
    options.add_budgets(command)
    text = (
        "width: narrower layers alone; both: merge tokens, too; auto: both for MACs, latency and accuracy, if RUN can"
    )
    command.add_argument("--axes", choices=get_args(Axes), default="auto", help=text)
    add = command.add_argument_group("budgets of accuracy: the smallest sub-network that keeps them").add_argument
    add("--top1", metavar="PERCENT", help="minimum top-1 accuracy on --data, in percent (75, 75%%)")
    add("--max-drop", metavar="POINTS", help="maximum loss of top-1 accuracy on --data, in points (2, 2%%)")
    what = "labelled images for --top1 and --max-drop: a folder with val/, or class folders"
    options.add_data(command, what, required=False)
    options.add_limit(command)
    where = "folder to write the small model to; of several sizes (--macs 10/12,8/12) each gets its amount appended"
    options.add_out(command, "SMALL", where)


def export_options(command: ArgumentParser) -> None:
    """SMALL and a format."""
    command.add_argument("small", metavar="SMALL", help="folder of a small model, or user/name on the hub")
    command.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="file format (default: %(default)s)")
    text = f"images to compare on (default: {COMPARED}; with --int8, which is calibrated on them, {CALIBRATED})"
    command.add_argument("--images", type=positive, metavar="N", help=text)
    text = "weights and arithmetic in float16; images and logits stay in float32"
    command.add_argument("--half", action="store_true", help=text)
    text = "version of ONNX operators (default: torch's choice)"
    command.add_argument("--opset", type=positive, metavar="N", help=text)
    text = "linear layers in 8-bit integers, calibrated on --data; for onnx and openvino"
    command.add_argument("--int8", action="store_true", help=text)
    text = f"refuse an int8 file that agrees with float32 on fewer images (default: {MIN_AGREEMENT:g}; 0: accept all)"
    command.add_argument("--min-agreement", type=float, metavar="PERCENT", help=text)
    what = "images to compare on, a folder with val/ or the class folders (default: noise); for --int8 any images"
    options.add_data(command, what, required=False)
    where = "file to write (default: SMALL.onnx, SMALL-int8.onnx, SMALL.pt2, or the folder SMALL-openvino and so on)"
    options.add_out(command, "FILE", where, required=False)


def push_options(command: ArgumentParser) -> None:
    """A saved folder and a repository."""
    add = command.add_argument
    add("target", metavar="SMALL|RUN", help="a saved folder")
    add("repo", metavar="USER/NAME", help="repository; created if it does not exist")
    add("--curve", metavar="DIR", help="folder written by curve, for the model card")
    add("--license", metavar="NAME", help="licence of the weights, by its name on the hub, for example apache-2.0")
    text = "repository of the model that it was made from (default: the one that convert recorded)"
    add("--base-model", metavar="USER/NAME", help=text)
    add("--private", action="store_true", help="make the repository private")
    add("--no-moments", action="store_true", help="do not upload second moments")
    add("--endpoint", metavar="URL", help="address of another hub")
    add("--dry-run", metavar="DIR", help="write the upload to this folder instead")
    add("--overwrite", action="store_true", help="replace the content of DIR")


def models_options(command: ArgumentParser) -> None:
    """Which models, and in what form."""
    text = "pattern of names in timm, for example 'vit_*dinov3' (default: examples)"
    command.add_argument("pattern", nargs="?", metavar="PATTERN", help=text)
    command.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")


def info_options(command: ArgumentParser) -> None:
    """A saved folder."""
    command.add_argument("target", metavar="SMALL|RUN", help=SAVED)


def demo_options(command: ArgumentParser) -> None:
    """Where to, and how long."""
    options.add_out(command, "DIR", "folder for the results (default: stratavit-demo)", required=False)
    text = "training epochs of the small model (default: %(default)s)"
    command.add_argument("--epochs", type=positive, default=30, help=text)


def evaluate_options(command: ArgumentParser) -> None:
    """A model, images, how to measure, and budgets."""
    command.add_argument("target", metavar="SMALL|RUN|FILE|MODEL", help=TARGET)
    options.add_model(command)
    options.add_data(command, LABELLED)
    options.add_judge(command)
    text = "compare outputs with those of the full network, too; for RUN and a budget, needs no head and no labels"
    command.add_argument("--agreement", action="store_true", help=text)
    options.add_budgets(command)


def predict_options(command: ArgumentParser) -> None:
    """A model, images, and how many classes."""
    add = command.add_argument
    add("target", metavar="SMALL|RUN|FILE|MODEL", help=TARGET)
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders with images directly in them")
    options.add_model(command)
    add("--class-map", metavar="FILE", help=f"{options.CLASS_MAP} (default: the names that the model has)")
    add("--top", type=positive, default=5, metavar="K", help="classes per image (default: %(default)s)")
    options.add_budgets(command)


def curve_options(command: ArgumentParser) -> None:
    """RUN, images, how to measure, and at which sizes."""
    command.add_argument("run", metavar="RUN", help=RUN)
    options.add_data(command, LABELLED)
    options.add_judge(command)
    options.add_ladder(command)
    options.add_out(command, "DIR", "folder for curve.csv and curve.png (default: RUN-curve)", required=False)


def report_options(command: ArgumentParser) -> None:
    """RUN, its accuracy or how to measure it, and its latency."""
    add = command.add_argument
    add("run", metavar="RUN", help=RUN)
    text = "folder written by curve, to take accuracy from (default: RUN-curve, if there is one)"
    add("--curve", metavar="DIR", help=text)
    add("--title", metavar="TEXT", help="title of the page (default: source and method)")
    group = command.add_argument_group("latency of the measured sizes, on this device")
    group.add_argument("--latency", action="store_true", help="time them and add milliseconds as an axis")
    options.add_latency_batch(group)
    group.add_argument("--runtime", choices=get_args(Runtime), default="eager", help="runtime (default: %(default)s)")
    group.add_argument("--dtype", choices=get_args(Precision), help="type of the weights (default: as saved)")
    group.add_argument("--threads", type=positive, default=0, help="CPU threads (default: torch's setting)")
    what = "labelled images to measure accuracy on: a folder with val/, or class folders"
    options.add_data(command, what, required=False)
    options.add_judge(command)
    options.add_ladder(command)
    options.add_out(command, "FILE", "page to write (default: RUN-report.html)", required=False)


def bench_options(command: ArgumentParser) -> None:
    """A saved folder, and what to time of it."""
    add = command.add_argument
    add("target", metavar="SMALL|RUN", help=f"{SAVED}; several sizes of a super-network are timed")
    ladder = ("10/12", "8/12", "6/12", "4/12")
    text = "for a super-network: shares of the dense MACs (default: 10/12 to 4/12)"
    add("--shares", type=options.shares, default=ladder, metavar="LIST", help=text)
    add("--batches", type=_counts, default=(1, 64), metavar="LIST", help="batch sizes (default: 1,64)")
    text = "any of eager, compiled, cudagraphs, onnx (default: eager, and onnx if installed)"
    add("--runtimes", type=lambda text: text.split(","), metavar="LIST", help=text)
    text = "minimum seconds per model and setting (default: %(default)s)"
    add("--seconds", type=float, default=2.0, help=text)
    options.add_costs(command)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(options.positive(part) for part in text.split(","))
