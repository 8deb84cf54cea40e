"""What a training run needs before its first step: its recipe, its folder, its data, its processes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from stratavit.data.batches import OUT_OF_MEMORY_HINT, watched
from stratavit.errors import ArtifactError, StrataViTError, reason_of
from stratavit.evaluation import curve_points
from stratavit.files.atomic import none_empty
from stratavit.files.lock import Lock
from stratavit.training import distributed, order
from stratavit.training.augmentation import drop_path
from stratavit.training.device_augmentation import DeviceAugmentation
from stratavit.training.optimizer import learning
from stratavit.training.recipe import Kind, Recipe
from stratavit.training.run_files import checkpoint_errors, read_state, resume_hint
from stratavit.training.task import TrainingTask
from stratavit.training.teacher import Teacher
from stratavit.training.trainer import Trainer
from stratavit.training.unused_keys import RECOVERED, report_unused
from stratavit.training.verdict import report_verdict
from stratavit.utils.model import classes_of

Config = Recipe | Mapping[str, Any] | str | Path | None


def recipe_for(
    config: Config, out: str | Path | None, resume: bool, kind: Kind, fixed: Mapping[str, Any], images: int | None
) -> Recipe:
    """The recipe of a run from what a user may give in its place.

    Args:
        config: A recipe; or some of its keys, or a file of them, the others as in the interrupted run, or as in the
            recipe of this `kind`; ``paper``.
        out: Folder of the run, an interrupted one if it is to `resume`.
        kind: Of the run.
        fixed: Keys with values that override any recipe.
        images: To train on, for a batch size that follows their number; None leaves that open.

    Raises:
        StrataViTError: See `Recipe.read` and `Recipe.resumed`; there is no run to resume.
    """
    begun = None
    if resume:
        if out is None:
            raise StrataViTError("resume: give the folder of the interrupted run")
        with checkpoint_errors(Path(out)):
            begun = Recipe.from_dict({**read_state(Path(out))["recipe"], **fixed}, str(out))
    if isinstance(config, Recipe):
        config = dataclasses.replace(config, **fixed)
    else:
        path, keys = (None, config) if isinstance(config, Mapping) else (config, {})
        config = Recipe.read(path, {**keys, **fixed}, kind, None if begun is None else begun.to_dict())
    if begun is not None:
        config = begun.resumed(config, str(out))
    return config if images is None else config.sized(images, distributed.launched())


def train(
    make_task: Callable[[int, Any], TrainingTask],
    measure: Callable[[Any, Iterable[Any]], list[curve_points.Point]],
    model: nn.Module,
    data_config: Mapping[str, Any],
    data: Dataset[Any],
    val_data: Dataset[Any] | Iterable[Any] | None,
    recipe: Recipe,
    out: str | Path | None,
    *,
    resume: bool,
    overwrite: bool,
    cpu: bool,
    teacher: nn.Module | None,
    origin: Mapping[str, Any] | None,
    epoch_images: int | None = None,
) -> None:
    """Trains the timm model of a task, made from number of steps and accelerator; see `piad.train_piad`.

    Before the task is made, which may drop what training makes stale, `measure` evaluates the network as it came.
    An epoch is a pass over the images, or holds `epoch_images` of them.
    """
    classes = classes_of(model)
    _check_teaching(recipe, teacher, classes)
    taught = None if teacher is None else Teacher(teacher, data_config)
    evaluation = None if val_data is None else batches(val_data, recipe.batch_size)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="stratavit-")) if out is None else out)
        accelerator, lock = distributed.accelerator(recipe, folder, cpu), Lock(folder)
        stack.callback(distributed.reset_accelerator, accelerator)
        stack.callback(lock.release)
        places = order.make_order(data, recipe, accelerator.num_processes, epoch_images)
        distributed.on_main(accelerator, lock.take if resume else lambda: make_folder(folder, overwrite, lock))
        state = read_state(folder) if resume else None
        stack.enter_context(order.kept_generators())
        stack.enter_context(drop_path(model, recipe.drop_path))
        stack.enter_context(learning(model, recipe.learn))
        stop = stack.enter_context(distributed.stop_on_signal())
        before = []
        if evaluation is not None and state is None:
            with watched("train: ", lambda: OUT_OF_MEMORY_HINT):
                before = measure(accelerator, evaluation)
        task = make_task(places.steps * recipe.epochs, accelerator)
        if accelerator.is_main_process:
            report_unused(recipe, task.kind, classes, accelerator.num_processes)
        on_device = recipe.augment_on == "device" and task.kind != RECOVERED  # which does so in any case
        augment = DeviceAugmentation(data_config, recipe, accelerator.device) if on_device else None
        trainer = Trainer(task, data, places, recipe, folder, evaluation, accelerator, stop, taught, augment)
        trainer.origin, trainer.before = dict(origin or {}), before
        stack.callback(distributed.release, accelerator, trainer.model)
        if state is not None:
            trainer.restore(state)
        stack.enter_context(distributed.explained_ends(accelerator, folder))
        stack.enter_context(watched("train: ", lambda: f"{OUT_OF_MEMORY_HINT}; {resume_hint(folder)}"))
        trainer.run()
        if accelerator.is_main_process:
            report_verdict(task.verdict(trainer.journal.rows()))


def _check_teaching(recipe: Recipe, teacher: nn.Module | None, classes: int) -> None:
    """Refuses a teacher without something to teach, and the reverse where no network could teach itself."""
    if not classes:
        if teacher is None:
            raise StrataViTError("train: the model has no head; give a teacher, which says what its features should be")
    elif teacher is not None and not (recipe.distil or recipe.distil_blocks):
        raise StrataViTError("train: a teacher is given, but distil is 0; set distil to the share that it teaches")
    elif teacher is None and (recipe.distil or recipe.distil_blocks) and recipe.mode == "plain":
        raise StrataViTError("train: distil needs a teacher here: there is no larger network that could teach")


def make_folder(out: Path, overwrite: bool, lock: Lock) -> None:
    """Makes an empty folder for a run, locked; what was there goes, if `overwrite` and no other run is there."""
    with none_empty(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.take()
            found = [path for path in out.iterdir() if path != lock.path]
            if found and not overwrite:
                raise ArtifactError(f"{out} is not empty; give another folder or ask to overwrite (--overwrite)")
            for path in found:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise ArtifactError(f"cannot write {out}: {reason_of(error)}; give a folder that can be written") from error


def batches(data: Dataset[Any] | Iterable[Any], batch_size: int) -> Iterable[Any]:
    """A loader as it is, or batches of a data set in order."""
    return DataLoader(data, batch_size) if isinstance(data, Dataset) else data
