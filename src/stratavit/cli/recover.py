"""The command ``recover``: label-free recovery of a small model, or of all sizes of a super-network."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.model_loading import model_at
from stratavit.cli.options import Outcome
from stratavit.cli.targets import model_named, saved_at
from stratavit.cli.train import begin, follower, origin
from stratavit.supernet import SuperNet
from stratavit.tasks.recover import recover as recover_model
from stratavit.training.recipe import RECOVERY_IMAGES
from stratavit.training.run_files import LOG_FILE, Journal


def recover(args: Namespace) -> Outcome:
    """SMALL or RUN and images to a folder of the same kind."""
    recipe = begin(args)
    target = saved_at(args.target)
    whole = folder_format.is_supernet(target)
    model: Any = SuperNet.load(target) if whole else sub_network.load(target, timm_form=True)
    recover_model(
        model,
        args.data,
        _teacher(args),
        args.minutes,
        args.steps,
        recipe,
        args.out,
        limit=args.images or RECOVERY_IMAGES,
        resume=args.resume,
        overwrite=args.overwrite,
        cpu=args.device == "cpu",
        origin=origin(args),
    )
    if follower(args):
        return {}, []
    facts = model.provenance["recover"]
    log = [row for row in Journal(Path(args.out) / LOG_FILE).rows() if row["kind"] == "epoch"]
    best = min([facts["before"], *log], key=lambda row: row["divergence"])
    result = {
        "out": str(args.out),
        "steps": facts["steps"],
        "seconds": sum(row["seconds"] for row in log),
        "agreement_before": facts["before"]["agreement"],
        "agreement": best["agreement"],
    }
    text = (
        f"recovered in {result['steps']} steps: agrees with the teacher on {result['agreement']:.1f} % of the images "
        f"held back, before on {result['agreement_before']:.1f} %; wrote {args.out}"
    )
    return result, [text]


def _teacher(args: Namespace) -> nn.Module | None:
    if args.teacher is None:
        return None
    teacher = model_named(args.teacher)
    if folder_format.is_supernet(teacher):
        return SuperNet.load(teacher, moments=False)
    return model_at(teacher, args.teacher_weights)
