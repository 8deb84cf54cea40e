"""Progressive Importance-Aware Dropout (PIAD): draw a prefix of a growing list, run it, train the full weights.

Source: method section 2 (arXiv 2511.11683).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset, Subset

from stratavit.errors import StrataViTError
from stratavit.tasks.piad_task import PiadTask, measure_before
from stratavit.training.launch import Config, batches, recipe_for, train
from stratavit.training.order import length_of
from stratavit.utils.model import classes_of

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


def train_piad(
    net: SuperNet,
    train_data: Dataset[Any],
    val_data: Dataset[Any] | Iterable[Any] | None = None,
    config: Config = None,
    out: str | Path | None = None,
    *,
    proxy: Iterable[Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    cpu: bool = False,
    teacher: nn.Module | None = None,
    origin: Mapping[str, Any] | None = None,
) -> SuperNet:
    """Trains a super-network in place, so that every prefix of its dropout list is a good network.

    Runs in one process, or in many under ``accelerate launch``; each draws its own prefixes. SIGTERM and Ctrl-C
    save the state and stop. `out` gets ``state.pt``, ``log.jsonl``, the trained super-network (`SuperNet.load`) and,
    with `val_data`, ``curve.csv``, ``curve.png`` and ``history.png`` (all evaluations).

    The accuracy of the network as it came is the first row of every curve (epoch 0). Then its second moments and its
    final mean are dropped. While training, cut channels count as zero (``method="paper"``), or `Recipe.compensation`
    says what replaces them, measured anew as the list grows.

    Args:
        net: A super-network, best contracted (`SuperNet.contract`).
        train_data: Of known length, returns ``(image [C, H, W], label)``, augmented by itself if at all; with
            ``augment_on = "device"`` whole pixels (uint8) of one size, at least the model's.
        val_data: To evaluate the ladder of budgets on: a data set of ``(image, label)``, or a loader of such batches.
            Networks without a head are measured by the nearest neighbours among the proxy images (`features.knn`).
        config: A `Recipe`; or some of its keys, or a recipe's file, the other keys as in the interrupted run, or
            as in `recipe.TRAINING`; or ``paper``. A resumed run may change only what has no effect on the weights, such
            as ``workers``. Units are the recipe's, not those of `SuperNet.set_units`.
        out: Folder of the run; must be empty or absent, unless `resume`. None keeps nothing but `net`.
        proxy: Batches that importance and means are measured on, best in the evaluation transform; run through several
            times per epoch while the list grows. None: ``config.proxy_images`` of `train_data`, evenly spread, as
            it returns them.
        resume: Go on with the interrupted run in `out`; on the CPU the result is bit-identical to that of a run that
            was not interrupted.
        overwrite: Empty `out` first, if there is something in it.
        cpu: Train on the CPU even where there is an accelerator.
        teacher: A model with the same classes whose outputs are ``config.distil`` of every target. Without one the full
            network teaches smaller prefixes. A network that returns features learns those of the teacher alone,
            whatever `distil` is; its teacher is the network as it came, unless another is given.
        origin: Kept in the state for whoever resumes the run: plain values, such as where network and images are.

    Returns:
        `net`, in eval mode, with the weights that `Recipe.keep` names and the finished list.

    Raises:
        StrataViTError: Bad data or recipe, a loss that is not finite (the last state stays), Accelerate is missing.
        ArtifactError: `out` is not free, holds no state to resume, or cannot be written.
        KeyboardInterrupt: Stopped on request; the state is saved.
    """
    recipe = recipe_for(config, out, resume, "train", fixed={}, images=length_of(train_data))
    if proxy is None and recipe.augment_on == "device":
        raise StrataViTError("train: with augment_on 'device' give proxy, images to measure on in the model's own form")
    if proxy is None:
        size = length_of(train_data)
        count = min(recipe.proxy_images, size)
        proxy = batches(Subset(train_data, [index * size // count for index in range(count)]), recipe.batch_size)
    if teacher is None and not classes_of(net):
        teacher = net.source_copy()
    train(
        partial(PiadTask, net, proxy, recipe),
        partial(measure_before, net, proxy, recipe.axes),
        net.model,
        net.data_config,
        train_data,
        val_data,
        recipe,
        out,
        resume=resume,
        overwrite=overwrite,
        cpu=cpu,
        teacher=teacher,
        origin=origin,
    )
    return net
