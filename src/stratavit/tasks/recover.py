"""Label-free recovery: a small model, or all sizes of a super-network, learns from its source on a few images."""

from __future__ import annotations

import copy
import dataclasses
import io
import time
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.data.unlabelled import Images, images_in
from stratavit.elastic.learning import learning_deltas
from stratavit.errors import StrataViTError
from stratavit.interop.libraries import as_source, as_timm
from stratavit.interop.transformers.models import is_transformers
from stratavit.models import architecture
from stratavit.models.architecture import resolve_data_config
from stratavit.tasks.finetune import Plain
from stratavit.tasks.recover_task import LOOKS, Clock, HeldBack, RecoverTask, lists_of
from stratavit.training import distributed
from stratavit.training.launch import Config, recipe_for, train
from stratavit.training.recipe import RECOVERY_IMAGES, RECOVERY_STEPS, Recipe
from stratavit.training.run_files import checkpoint_errors, read_state
from stratavit.training.task import SampledNetwork
from stratavit.training.teacher import Teacher
from stratavit.utils.model import is_super_network

FIXED: dict[str, Any] = {"mode": "plain", "distil": 1.0}  # keys of the recipe: the teacher alone says what is right
EVERY = 10  # one image in so many is held back
SPARE = 0.95  # share of the minutes that is planned
TIMED = 2  # steps


def recover(
    model: nn.Module,
    images: Images,
    teacher: nn.Module | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    config: Config = None,
    out: str | Path | None = None,
    *,
    limit: int = RECOVERY_IMAGES,
    resume: bool = False,
    overwrite: bool = False,
    cpu: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Recovers accuracy that cutting has cost, in place and without labels.

    The network learns what its source makes of random crops of the images: outputs, final tokens, and what comes out of
    every block. A tenth of the images is held back; the weights that agreed best with the source there are kept,
    and a run that no longer gets better ends. Interruptions, processes, precision and files are those of
    `train_piad`; `out` holds a network of the kind that was given.

    Args:
        model: What `SuperNet.extract` returned, or a `SuperNet` with a dropout list: then all of its sizes learn
            together. Its weights stay as they are; what is learned is a change of them that grows as modules become
            narrower (`elastic.delta`), so the full size remains the source.
        images: A folder with images anywhere in it, or any other form that `convert` reads. Labels are not used.
        teacher: The source, or a super-network of it, which teaches at full width; a super-network is its own if None.
        minutes: Most time of the whole call. Some steps are timed first; then no more are planned than fit.
        steps: Steps of the optimiser, rounded down to a multiple of the looks at the agreement (20). None: 80, more of
            which gained nothing on a thousand images.
        config: A `Recipe`; or some of its keys, or a recipe's file, the other keys as in the interrupted run, or as
            `recipe.RECOVERY` has them. Epochs follow from the number of steps.
        out: Folder of the run; must be empty or absent, unless `resume`. None keeps nothing but `model`.
        limit: Largest number of images; they are held in memory, 0.3 MB each at 224 pixels.
        resume, overwrite, cpu, origin: See `train_piad`. A resumed run goes on with the steps that were planned.

    Returns:
        `model`, in eval mode; of transformers a new model of its class.

    Raises:
        StrataViTError: Bad images or recipe, no teacher or one whose blocks do not correspond, too little time, a loss
            that is not finite (the last state stays), Accelerate is missing.
        ArtifactError: `out` is not free, holds no state to resume, or cannot be written; the model cannot be saved.
        KeyboardInterrupt: Stopped on request; the state is saved.
    """
    clock = Clock(time.perf_counter())
    _check_length(minutes, steps, resume)
    steps = RECOVERY_STEPS if steps is None else steps
    whole, foreign = is_super_network(model), is_transformers(model)
    net: Any = model if whole else Plain(as_timm(model))
    data_config = net.data_config if whole else resolve_data_config(net.model)
    source = _source(net, teacher)
    begun, length = _begun(out, resume)
    recipe = recipe_for(config, out, resume, "recover", fixed=FIXED | begun, images=None)
    lists = lists_of(net, data_config, recipe)
    learned, aside = _shared_out(images_in(images, net.model, data_config, limit, recipe.workers))
    recipe = recipe.sized(len(learned), distributed.launched())
    held = HeldBack(aside, Teacher(source, data_config))
    go = partial(_run, lists=lists, data_config=data_config, images=learned, held=held, teacher=source, cpu=cpu)
    if not resume:
        if minutes is not None:
            clock.limit = 60 * minutes
            steps = min(steps, _steps_within(clock, partial(go, copy.deepcopy(net)), recipe))
        recipe, length = _planned(recipe, steps)
    _prepare(net)
    go(net, clock=clock, recipe=recipe, length=length, out=out, resume=resume, overwrite=overwrite, origin=origin)
    return as_source(net.model) if foreign else model


def _run(
    net: Any,
    *,
    lists: list[list[SampledNetwork]],
    data_config: Mapping[str, Any],
    images: Tensor,
    held: HeldBack,
    teacher: nn.Module,
    cpu: bool,
    clock: Clock,
    recipe: Recipe,
    length: int,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Trains by a recipe; an epoch, between two looks, holds `length` images."""
    with learning_deltas(net.model, net.elastic) if is_super_network(net) else nullcontext():
        train(
            partial(RecoverTask, net, lists, data_config, held, clock, recipe),
            lambda accelerator, loader: [],
            net.model,
            data_config,
            images,  # type: ignore[arg-type]  # has a length, and images by number
            None,
            recipe,
            out,
            resume=resume,
            overwrite=overwrite,
            cpu=cpu,
            teacher=teacher,
            origin=origin,
            epoch_images=length,
        )


def _check_length(minutes: float | None, steps: int | None, resume: bool) -> None:
    if resume and (minutes is not None or steps is not None):
        raise StrataViTError("recover: a resumed run goes on with the steps that were planned; leave out both")
    for name, amount, least in (("minutes above 0", minutes, 1e-9), ("steps of at least 1", steps, 1)):
        if amount is not None and not least <= amount < float("inf"):
            raise StrataViTError(f"recover: expected {name}, got {amount}")


def _source(net: Any, teacher: nn.Module | None) -> nn.Module:
    """The model to learn from."""
    if teacher is None:
        if not is_super_network(net):
            raise StrataViTError(
                "recover: a small model needs its teacher: the model that it was cut from, or the super-network"
            )
        teacher = net
    source: nn.Module = teacher.source_copy() if is_super_network(teacher) else as_timm(teacher)  # type: ignore[operator]
    return source


def _shared_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to learn from, and those held back; copies, so that no image is held twice."""
    held = torch.arange(len(images)) % EVERY == 0
    return images[~held], images[held]


def _begun(out: str | Path | None, resume: bool) -> tuple[dict[str, Any], int]:
    """What follows from how long a resumed run was to be: keys of its recipe, and the images of an epoch."""
    if not resume or out is None:
        return {}, 0
    with checkpoint_errors(Path(out)):
        state = read_state(Path(out))
        return {key: state["recipe"][key] for key in ("epochs", "warmup_epochs")}, int(state["epoch_images"])


def _prepare(net: Any) -> None:
    """Refuses what could not be trained or saved, and drops what was measured on the weights as they are now."""
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise StrataViTError("recover: all weights are frozen; call requires_grad_(True) first")
    if not is_super_network(net):
        architecture.describe(net.model)
        return
    net._dense_outputs = net._seen = None
    for module in net.elastic.values():
        module.crossed = ()
        module.corrected.clear()


def _planned(recipe: Recipe, steps: int, looks: int = LOOKS) -> tuple[Recipe, int]:
    """The recipe for at most so many steps, and the images of an epoch."""
    looks = min(looks, steps)
    length = steps // looks * recipe.batch_size * recipe.accumulate * distributed.launched()
    return dataclasses.replace(recipe, epochs=looks, warmup_epochs=min(recipe.warmup_epochs, looks - 1)), length


def _steps_within(clock: Clock, go: Any, recipe: Recipe) -> int:
    """Steps for which there is time: a few are run first, on a copy.

    Raises:
        StrataViTError: Not even for one.
    """
    trial, length = _planned(dataclasses.replace(recipe, tracker="none", save_every=2), 2 * TIMED, looks=2)
    timed, begun = Clock(time.perf_counter()), time.perf_counter()
    try:
        with redirect_stderr(io.StringIO()):
            go(clock=timed, recipe=trial, length=length)
    except KeyboardInterrupt as asked:
        raise type(asked)("stopped while steps were timed; nothing was written") from asked
    ended = time.perf_counter()
    (first, _), (_, before), (start, stop) = timed.looks
    step, look = (start - before) / TIMED, stop - start
    around = ended - begun - (stop - first)  # setting up, and writing the result
    left = SPARE * clock.limit - (ended - clock.started) - around - (LOOKS + 1) * look
    if left < step:
        raise StrataViTError(
            f"recover: {clock.limit / 60:.3g} minutes are too few: a step takes {step:.3g} s here, and all else "
            f"{SPARE * clock.limit - left:.3g} s; give more minutes, or steps"
        )
    steps = int(left / step)
    return int(distributed.broadcast(steps)) if distributed.launched() > 1 else steps
