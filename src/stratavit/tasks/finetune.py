"""Fine-tuning of one small model: the training loop of PIAD, without a list.

Source: method section 2 (arXiv 2511.11683), whose recipe (`PAPERS`) is 30 epochs, learning rate 5e-5 to 1e-6, no
warm-up, and DeiT's for the rest; the default is our own, because that one needs many images.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from stratavit.artifacts import folder_format, sub_network
from stratavit.artifacts.timm_config import FILE as TIMM_FILE
from stratavit.errors import StrataViTError
from stratavit.evaluation import curve_points
from stratavit.evaluation.accuracy import evaluate
from stratavit.interop.libraries import as_source, as_timm
from stratavit.interop.transformers.models import is_transformers
from stratavit.models import architecture
from stratavit.models.architecture import resolve_data_config
from stratavit.models.cost import linear_macs
from stratavit.spec import Spec
from stratavit.training.launch import Config, recipe_for, train
from stratavit.training.order import length_of
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import publish
from stratavit.training.task import SampledNetwork, TrainingTask
from stratavit.training.unused_keys import SMALL
from stratavit.utils.model import is_super_network

SMALL_FILES = (folder_format.WEIGHTS_FILE, TIMM_FILE, folder_format.JSON_FILE)


def finetune(
    model: nn.Module,
    train_data: Dataset[Any],
    val_data: Dataset[Any] | Iterable[Any] | None = None,
    config: Config = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cpu: bool = False,
    teacher: nn.Module | None = None,
    origin: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fine-tunes a small model (or any timm `VisionTransformer`) in place.

    Interruptions, processes, precision and files are those of `train_piad`; `out` holds a sub-network at the end
    (`stratavit.load`).

    Args:
        model: What `SuperNet.extract` returned. For another data set give it a new head first
            (``model.reset_classifier(classes)``).
        train_data: Of known length, returns ``(image [C, H, W], label)``, augmented by itself if at all.
        val_data: Labelled images to evaluate on: a data set, or a loader.
        config: A `Recipe`; or some of its keys, or a recipe's file, the other keys as in the interrupted run, or as
            `recipe.FINETUNING` has them; or ``paper``. Keys of the dropout list have no effect, as is reported; `mode`
            is ``plain``.
        out: Folder of the run; must be empty or absent, unless `resume`. None keeps nothing but `model`.
        resume, overwrite, cpu: See `train_piad`.
        teacher: A model with the same classes whose outputs are ``config.distil`` of every target.
        origin: See `train_piad`.

    Returns:
        `model`, in eval mode, with the weights that `Recipe.keep` names; of transformers a new model of its class.

    Raises:
        StrataViTError: Bad data or recipe, a loss that is not finite (the last state stays), Accelerate is missing.
        ArtifactError: `out` is not free, holds no state to resume, or cannot be written; the model cannot be saved.
        KeyboardInterrupt: Stopped on request; the state is saved.
    """
    if is_super_network(model):
        raise StrataViTError("finetune: this is a super-network: train it with train_piad, or extract a model first")
    recipe = recipe_for(config, out, resume, "finetune", fixed={"mode": "plain"}, images=length_of(train_data))
    foreign, model = is_transformers(model), as_timm(model)
    architecture.describe(model)  # refused before any work if it could not be saved
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise StrataViTError("finetune: all weights are frozen; call model.requires_grad_(True) first")
    data_config = resolve_data_config(model)
    train(
        partial(FinetuneTask, model, data_config, recipe),
        partial(_measure_before, model, data_config),
        model,
        data_config,
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
    return as_source(model) if foreign else model


class Plain(nn.Module):
    """A model of one size in the place of a super-network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def at(self, spec: Mapping[str, int] | None = None) -> AbstractContextManager[nn.Module]:
        """Yields `model`, which has one size."""
        return nullcontext(self.model)

    def forward(self, images: Tensor, spec: Mapping[str, int] | None = None) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        logits: Tensor = self.model(images)
        return logits


class FinetuneTask(TrainingTask):
    """One small model in training."""

    kind = SMALL

    def __init__(
        self, model: nn.Module, data_config: Mapping[str, Any], recipe: Recipe, steps: int, accelerator: Any
    ) -> None:
        super().__init__(Plain(model), linear_macs(model, data_config["input_size"]), recipe, steps, accelerator)

    def draw(self, generator: random.Random) -> list[SampledNetwork]:
        """The model as it is."""
        return [SampledNetwork(Spec({}), self.full_macs)]

    def evaluate(self, loader: Iterable[Any]) -> list[curve_points.Point]:
        """Its accuracy, one point."""
        return _measured(self.eval_net.model, self.full_macs, loader)

    def graduate(self, facts: dict[str, Any]) -> None:
        """Gives the model the weights to keep; eval mode. `facts` go into its provenance."""
        model = self.net.model
        model.load_state_dict(self.eval_net.model.state_dict())
        model.provenance = {**getattr(model, "provenance", {}), "finetune": facts}
        model.eval()

    def publish(self, folder: Path, points: list[curve_points.Point]) -> None:
        """Writes the model into the run's folder."""
        publish(lambda path: sub_network.save(self.net.model, path, overwrite=True), SMALL_FILES, folder)


def _measured(model: nn.Module, macs: int, loader: Iterable[Any]) -> list[curve_points.Point]:
    params = sum(p.numel() for p in model.parameters())
    return [curve_points.Point("12/12", 1.0, macs, params, **evaluate(model, loader).to_dict())]  # type: ignore[arg-type]


def _measure_before(
    model: nn.Module, data_config: Mapping[str, Any], accelerator: Any, loader: Iterable[Any]
) -> list[curve_points.Point]:
    model.float().to(accelerator.device)
    return _measured(model, linear_macs(model, data_config["input_size"]), loader)
