"""Progressive Importance-Aware Dropout (PIAD): draw a prefix of a growing list, run it, train the full weights.

Source: method section 2 (arXiv 2511.11683).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from stratavit.loop import train
from stratavit.pupil import Pupil
from stratavit.recipe import Recipe
from stratavit.supernet import SuperNet
from stratavit.teacher import Teacher


def train_piad(
    net: SuperNet,
    train_data: Dataset[Any],
    val_data: Dataset[Any] | Iterable[Any] | None = None,
    config: Recipe | Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    proxy: Iterable[Any] | None = None,
    resume: bool = False,
    cpu: bool = False,
    teacher: nn.Module | None = None,
) -> SuperNet:
    """Trains a super-network in place, so that every prefix of its dropout list is a good network.

    Runs in one process, or in many under ``accelerate launch``; each draws its own prefixes. SIGTERM and Ctrl-C
    save the state and stop. `out` gets ``state.pt``, ``log.jsonl``, the trained super-network (`SuperNet.load`) and,
    with `val_data`, ``curve.csv`` and ``curve.png``.

    Second moments and the final mean of an untrained network are dropped. While training, cut channels count as zero
    (``method="paper"``) or are replaced by their mean, measured at the start of every epoch (default).

    Args:
        net: A super-network, best contracted (`SuperNet.contract`).
        train_data: Of known length, gives ``(image [C, H, W], label)``, augmented by itself if at all.
        val_data: To evaluate the ladder of budgets on: a data set of ``(image, label)``, or a loader of such batches.
        config: A `Recipe`, some of its keys, or a recipe's file. None takes the interrupted run's, or the paper's for
            DeiT-S. A resumed run may change only what has no effect on the weights, such as ``workers``.
        out: Folder of the run; must be empty or absent, unless `resume`. None keeps nothing but `net`.
        proxy: Batches that importance and means are measured on, best in the evaluation transform; run through several
            times per epoch while the list grows. None takes ``config.proxy_images`` of `train_data`, evenly spread, as
            it gives them.
        resume: Go on with the interrupted run in `out`; on the CPU the result is bit-identical to that of a run that
            was not interrupted.
        cpu: Train on the CPU even where there is an accelerator.
        teacher: A model with the same classes whose answers are ``config.distil`` of every target. Without one the full
            network teaches smaller prefixes.

    Returns:
        `net`, in eval mode, with the weights that `Recipe.keep` names and the finished list.

    Raises:
        StrataViTError: Bad data or recipe, a loss that is not finite (the last state stays), Accelerate is missing.
        ArtifactError: `out` is not free, holds no state to resume, or cannot be written.
        KeyboardInterrupt: Stopped on request; the state is saved.
    """
    recipe = as_recipe(config)
    sizes = recipe or Recipe()
    if proxy is None:
        proxy = batches(spread(train_data, sizes.proxy_images), sizes.batch_size)

    def learner(recipe: Recipe, steps: int, accelerator: Any) -> Pupil:
        return Pupil(net, recipe, recipe.decay(steps), proxy, accelerator)

    taught = None if teacher is None else Teacher.of(teacher, net.data_config)
    with folder_of(out) as folder:
        evaluation = None if val_data is None else batches(val_data, sizes.batch_size)
        train(learner, net.model, train_data, recipe, Recipe(), folder, evaluation, resume, cpu, taught)
    return net


def as_recipe(config: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe | None:
    """A recipe from what a user may give in its place.

    Raises:
        StrataViTError: See `Recipe.read` and `Recipe.from_dict`.
    """
    if config is None or isinstance(config, Recipe):
        return config
    return Recipe.from_dict(config) if isinstance(config, Mapping) else Recipe.read(config)


def spread(data: Dataset[Any], count: int) -> Dataset[Any]:
    """At most `count` items, evenly spread."""
    size = len(data)  # type: ignore[arg-type]
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
