"""PIAD in a training loop that is not ours: what callbacks of other libraries have in common.

The loop stays as its owner wrote it, with its model, loss, optimiser and checkpoints. Added to it are a prefix of the
dropout list for every batch, the growth of that list, and the super-network's own folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stratavit.errors import ArtifactError, StrataViTError, described
from stratavit.files.folders import check_free
from stratavit.tasks.drawn_size import DrawnSize
from stratavit.training import distributed, order
from stratavit.training.recipe import LIST_KEYS, Recipe
from stratavit.training.task import SampledNetwork
from stratavit.utils.model import is_super_network, model_device, model_dtype
from stratavit.utils.progress import overall
from stratavit.utils.random_streams import stream

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet
    from stratavit.tasks.piad_task import PiadTask

_ELSEWHERE = ("mode", "layer_drop", "list_epochs", "growths", "proxy_images")  # of `LIST_KEYS`: said by other arguments
KEYS = ("seed", *(key for key in LIST_KEYS if key not in _ELSEWHERE))
_BASE: dict[str, Any] = {"compensation": "auto", "list_source": "auto", "growths": 1, "ema_decay": 0.0, "keep": "raw"}


class PrefixCallback:
    """What the callbacks of both libraries are made with; see `SuperNetTrainerCallback`.

    Attributes:
        base: The library's class; `object` where the library is not installed.
        libraries: Packages that the training loop may be of.
        needs: What is said where a callback is made without its library.
    """

    base: Any
    libraries: tuple[str, ...]
    needs: str

    def __init__(
        self,
        proxy: Iterable[Any],
        out: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        stages: int = 10,
        stage_steps: int | None = None,
        overwrite: bool = False,
    ) -> None:
        if self.base is object:
            raise StrataViTError(self.needs)
        self.training = PrefixTraining(proxy, out, config, stages, stage_steps, overwrite, self.libraries)

    @property
    def drawn(self) -> SampledNetwork | None:
        """The sub-network of the last batch: its spec, MACs and position in the list."""
        return self.training.drawn


class PrefixTraining:
    """Draws, lets the list grow and saves at the moments that a library's callback passes on.

    Args:
        proxy, out, config, stages, stage_steps, overwrite: See `SuperNetTrainerCallback`.
        libraries: Packages that the training loop may be of.

    Attributes:
        drawn: The sub-network of the last batch.
        task: The super-network in training; None outside of one.
        begun: Stages begun.
        state: Plain values to save in the library's checkpoint, so that a resumed run draws the same sizes.

    Raises:
        StrataViTError: An unknown key or a bad value.
    """

    def __init__(
        self,
        proxy: Iterable[Any],
        out: str | Path | None,
        config: Mapping[str, Any] | None,
        stages: int,
        stage_steps: int | None,
        overwrite: bool,
        libraries: tuple[str, ...],
    ) -> None:
        self.proxy, self.out, self.overwrite = proxy, None if out is None else Path(out), overwrite
        self.recipe, self.asked_steps, self.libraries = _recipe(config or {}, stages), stage_steps, libraries
        self.size, self.state, self.stage_steps, self.begun = DrawnSize(), dict[str, Any](), 0, 0
        self.drawn: SampledNetwork | None = None
        self.task: PiadTask | None = None
        self._hook: Any = None
        self._kept = -1
        if stage_steps is not None and stage_steps < 1:
            raise StrataViTError(f"stage_steps must be at least 1, got {stage_steps}")

    def begin(
        self,
        model: nn.Module,
        steps: float,
        step: int,
        main: bool,
        folders: Sequence[str | Path],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Training begins, or goes on from a checkpoint.

        Args:
            model: What the library trains; it holds the super-network.
            steps: Of the optimiser, in all; not finite or not above 0 if the library does not know.
            step: Steps done.
            main: This is the process that writes.
            folders: Where the library writes.
            state: Of the checkpoint, if it goes on from one that has it.

        Raises:
            StrataViTError: There is not one super-network, it is not in float32, or stages do not fit the steps.
            ArtifactError: `out` is not free.
        """
        from stratavit.tasks.piad_task import PiadTask  # with all that evaluates; a callback is made without it

        self.stop()  # a training that ended by an error
        net = _super_network_in(model)
        if state is not None:
            self._check_same(state)
        self.stage_steps = self._length_of_stage(steps) if state is None else int(state["stage_steps"])
        self._check_out(folders, resumed=state is not None)
        loop = SimpleNamespace(device=model_device(net), is_main_process=main)
        task = self.task = PiadTask(net, self.proxy, self.recipe, 0, loop)
        self._hook, self._kept = net.register_forward_pre_hook(self.size, with_kwargs=True), -1
        self.begun, self.drawn = 0, None
        if state is not None:
            self.begun = int(state["begun"])
            task.restore_lists(state)
            with self._measuring("means", step):  # as where the checkpoint was written, see `keep`
                task.refresh_means(net)
        self._note()

    def begin_batch(self, step: int, *moment: int) -> None:
        """A batch begins: draws its sub-network, which follows from the seed and the moment alone.

        Args:
            step: Steps of the optimiser done; where a stage begins, the list grows first.
            *moment: What tells this batch from all others; the same on every process.
        """
        assert self.task is not None
        stage = step // self.stage_steps
        if self.begun <= stage:
            with self._measuring("stage", stage):
                self.task.begin_stage(stage)
            self.begun = stage + 1
            self._note()
        self.drawn = self.task.draw(stream(self.recipe.seed, "draw", *moment))[0]
        self.size.set(self.drawn.spec, self.libraries)

    def end_batch(self) -> None:
        """A batch ended: whatever runs until the next one runs at full size."""
        self.size.clear()

    def keep(self, step: int) -> None:
        """The library writes a checkpoint: means are measured on its weights, and the super-network is written."""
        if self.task is None or self._kept == step:
            return
        with self._measuring("means", step):
            self.task.settle()
        self._write()
        self._kept = step

    def finish(self, step: int) -> None:
        """Training has ended: the super-network gets its list and its means, and is written."""
        assert self.task is not None
        facts = {"loop": self.libraries[0], "steps": step, "recipe": _keys(self.recipe), "stages": self.recipe.stages}
        with self._measuring("means", step):
            self.task.graduate({**facts, "stage_steps": self.stage_steps})
        self._write()
        self.stop()

    def stop(self) -> None:
        """Leaves the network alone."""
        if self._hook is not None:
            self._hook.remove()
        self.size.clear()
        self._hook = self.task = None

    def _write(self) -> None:
        assert self.task is not None
        net, out = self.task.net, self.out
        if out is not None:
            distributed.on_main(self.task.accelerator, lambda: net.save(out, overwrite=True))

    def _note(self) -> None:
        assert self.task is not None
        facts = {"recipe": _keys(self.recipe), "stages": self.recipe.stages, "stage_steps": self.stage_steps}
        self.state = {**facts, "begun": self.begun, **self.task.lists()}

    @contextmanager
    def _measuring(self, *moment: int | str) -> Iterator[None]:
        """Around what is measured: the loop's random numbers stay as they are, and gradients can be had.

        Some libraries write checkpoints in inference mode; bars of ours would tear theirs.
        """
        with order.kept_generators(), torch.inference_mode(False), torch.enable_grad(), overall("", 1.0, silent=True):
            order.seed_all(self.recipe.seed, *moment)
            yield

    def _length_of_stage(self, steps: float) -> int:
        """Steps of a stage: as asked, or so many that the list ends after half of all steps."""
        stages, known = self.recipe.stages, steps > 0 and math.isfinite(steps)
        if self.asked_steps is None and not known:
            raise StrataViTError("the training loop does not know its number of steps; give stage_steps")
        length = self.asked_steps or max(int(steps) // (2 * stages), 1)
        if known and (stages - 1) * length >= steps:
            raise StrataViTError(
                f"{stages} stages of {length} steps do not fit into the {steps:.0f} steps of this training; lower "
                "stages or stage_steps, or the list stays unfinished"
            )
        return length

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """Refuses to go on with other options than the checkpoint's."""
        ours, theirs = {**_keys(self.recipe), "stages": self.recipe.stages}, {**state["recipe"], **state}
        if self.asked_steps is not None:
            ours["stage_steps"] = self.asked_steps
        for key, value in ours.items():
            if theirs.get(key) != value:
                raise StrataViTError(
                    f"the checkpoint was trained with {key} = {described(theirs.get(key))}; a resumed run cannot make "
                    f"it {described(value)}"
                )

    def _check_out(self, folders: Sequence[str | Path], resumed: bool) -> None:
        """Refuses a folder that cannot be written, or whose replacement would take the library's files with it."""
        if self.out is None:
            return
        check_free(self.out, self.overwrite or resumed)
        for folder in folders:
            if Path(folder).resolve().is_relative_to(self.out.resolve()):
                raise ArtifactError(
                    f"{self.out} is replaced whenever the super-network is saved, but the checkpoints go to {folder}; "
                    "give the super-network a folder of its own"
                )


def _recipe(config: Mapping[str, Any], stages: int) -> Recipe:
    """The recipe of the list; what it says of the loop has no effect."""
    for key in config:
        if key not in KEYS:
            raise StrataViTError(f"config: unknown key {described(key)}; the keys are {', '.join(KEYS)}")
    if config.get("sampling") == "sandwich":
        raise StrataViTError(
            "config: sampling 'sandwich' runs three sizes on every batch, but a callback sets one; use 'uniform' or "
            "'budget', or train_piad"
        )
    return Recipe.from_dict({**_BASE, "epochs": stages, "list_epochs": stages, **config}, "config")


def _keys(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key in KEYS}


def _super_network_in(model: nn.Module) -> SuperNet:
    found: list[Any] = [module for module in model.modules() if is_super_network(module)]
    if len(found) != 1:
        raise StrataViTError(
            f"the model that is trained must hold one SuperNet, found {len(found)}; make it a part of the model, as in "
            "self.net = net"
        )
    if model_dtype(found[0]) != torch.float32:
        raise StrataViTError(
            f"the super-network is in {model_dtype(found[0])}, expected float32; train it in mixed precision instead"
        )
    net: SuperNet = found[0]
    return net
