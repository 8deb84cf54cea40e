"""What a training run needs before its first step: its recipe, its folder, its data, its processes."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from stratavit.data.batches import OUT_OF_MEMORY_HINT, watched
from stratavit.errors import ArtifactError, StrataViTError, reason_of
from stratavit.files.atomic import none_empty
from stratavit.files.folders import check_free
from stratavit.files.lock import Lock
from stratavit.training import distributed, order, unused_keys
from stratavit.training.augmentation import drop_path
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import checkpoint_errors, read_state, resume_hint
from stratavit.training.task import TrainingTask
from stratavit.training.teacher import Teacher
from stratavit.training.trainer import Trainer
from stratavit.utils.model import classes_of

Config = Recipe | Mapping[str, Any] | str | Path | None


def recipe_for(
    config: Config,
    out: str | Path | None,
    resume: bool,
    base: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a run from what a user may give in its place.

    Args:
        config: A recipe; or some of its keys, or a file of them, the others as in the interrupted run, or `base`.
        out: Folder of the run.
        resume: Whether an interrupted run is there.
        base: Keys in place of the defaults of `Recipe`, for a new run.
        fixed: Keys that are as they are here, whatever a recipe says.

    Raises:
        StrataViTError: See `Recipe.read` and `Recipe.resumed`; there is no run to resume.
    """
    begun, fixed = None, dict(fixed or {})
    if resume:
        if out is None:
            raise StrataViTError("resume: give the folder of the interrupted run")
        with checkpoint_errors(Path(out)):
            begun = Recipe.from_dict(dict(read_state(Path(out))["recipe"]) | fixed, str(out))
    if isinstance(config, Recipe):
        config = dataclasses.replace(config, **fixed)
    else:
        filled = base if begun is None else begun.to_dict()
        given = dict(config) if isinstance(config, Mapping) else {}
        config = Recipe.read(None if isinstance(config, Mapping) else config, given | fixed, filled)
    return config if begun is None else begun.resumed(config, str(out))


def train(
    make_task: Callable[[int, Any], TrainingTask],
    model: nn.Module,
    data: Dataset[Any],
    recipe: Recipe,
    out: Path,
    evaluation: Iterable[Any] | None,
    resume: bool,
    overwrite: bool,
    cpu: bool,
    teacher: Teacher | None,
) -> None:
    """Trains in `out`, from the start or from where an interrupted run stood.

    Args:
        make_task: Makes it from number of steps and accelerator.
        model: The timm model that it trains.
        recipe: See `recipe_for`.
        out: Folder of the run.
        data, evaluation, resume, overwrite, cpu, teacher: See `piad.train_piad`.
    """
    if classes_of(model):
        check_teaching(recipe, teacher)
    elif teacher is None:
        raise StrataViTError("train: the model has no head; give a teacher, which says what its features should be")
    accelerator, lock = distributed.accelerator(recipe, out, cpu), Lock(out)
    with ExitStack() as stack:
        stack.callback(distributed.reset_accelerator, accelerator)
        stack.callback(lock.release)
        places = order.make_order(data, recipe, accelerator.num_processes)
        distributed.on_main(accelerator, lock.take if resume else lambda: make_folder(out, overwrite, lock))
        state = read_state(out) if resume else None
        stack.enter_context(order.kept_generators())
        stack.enter_context(drop_path(model, recipe.drop_path))
        stop = stack.enter_context(distributed.stop_on_signal())
        task = make_task(places.steps * recipe.epochs, accelerator)
        if accelerator.is_main_process:
            unused_keys.tell(recipe, task.kind, classes_of(model), accelerator.num_processes)
        trainer = Trainer(task, data, places, recipe, out, evaluation, accelerator, stop, teacher)
        stack.callback(distributed.release, accelerator, trainer.model)
        if state is not None:
            trainer.restore(state)
        with (
            interrupted(out),
            watched("train: ", lambda: f"{OUT_OF_MEMORY_HINT}; {resume_hint(out)}"),
            distributed.raise_on_all_ranks(accelerator, out),
        ):
            trainer.run()


@contextmanager
def interrupted(out: Path) -> Iterator[None]:
    """Says what a second Ctrl-C leaves."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise type(stop)(f"interrupted at once; {resume_hint(out)}") from stop
        raise


def check_teaching(recipe: Recipe, teacher: Teacher | None) -> None:
    """Whether there is something to teach with, if and only if something is to be taught.

    Raises:
        StrataViTError: There is a teacher and `distil` is 0, or the reverse where no network could teach itself.
    """
    if teacher is not None and not recipe.distil:
        raise StrataViTError("train: a teacher is given, but distil is 0; set distil to the share that it teaches")
    if teacher is None and recipe.distil and recipe.mode == "plain":
        raise StrataViTError("train: distil needs a teacher here: there is no larger network that could teach")


def make_folder(out: Path, overwrite: bool, lock: Lock) -> None:
    """An empty folder for a run, locked; what was there goes, if that was asked for and no other run is there.

    Raises:
        ArtifactError: It is not free, or cannot be made.
    """
    try:
        check_free(out, overwrite, whole=False)
    except ArtifactError:
        lock.check()  # which says more
        raise
    with none_empty(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.take()
            found = [path for path in out.iterdir() if path != lock.path]
            if found and not overwrite:  # of a run that began and ended meanwhile
                raise ArtifactError(f"{out} is not empty; give another folder or ask to overwrite (--overwrite)")
            for path in found:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise ArtifactError(f"cannot write {out}: {reason_of(error)}; give a folder that can be written") from error


def spread(data: Dataset[Any], count: int) -> Dataset[Any]:
    """At most `count` items, evenly spread."""
    size = order.length_of(data)
    count = min(count, size)
    return Subset(data, [index * size // count for index in range(count)])


def batches(data: Dataset[Any] | Iterable[Any], batch_size: int) -> Iterable[Any]:
    """A loader as it is, or batches of a data set in order."""
    return DataLoader(data, batch_size) if isinstance(data, Dataset) else data


@contextmanager
def folder_of(out: str | Path | None) -> Iterator[Path]:
    """The folder of a run, or one that is gone afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="stratavit-") as temporary:
        yield Path(temporary) / "run"
