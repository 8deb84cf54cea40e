"""The training loop: steps, epochs, evaluation, and a state that survives any kill.

Distribution, precision and trackers are Hugging Face Accelerate's; optimiser, schedule, mixup and weight averaging are
timm's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stratavit.data.batches import check_images, check_labels, unpack
from stratavit.data.image_folder import rest
from stratavit.errors import StrataViTError
from stratavit.evaluation.curve_points import Point, last_curve, with_before
from stratavit.files.atomic import readable_errors
from stratavit.training import distributed, order, run_files
from stratavit.training.compiling import CompiledSizes
from stratavit.training.imitation import Following, target_of
from stratavit.training.optimizer import Losses, optimiser_and_schedule
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import Journal, write_state
from stratavit.training.task import SampledNetwork, TrainingTask
from stratavit.training.teacher import Teacher
from stratavit.training.tracing import followed
from stratavit.utils.model import classes_of
from stratavit.utils.progress import overall, track
from stratavit.utils.random_streams import stream


class Trainer:
    """One training run; see `launch.train` for the arguments.

    Attributes:
        step: Steps of the optimiser done.
        begun: Stages begun (list grown, means measured); a stage is an epoch, or a part of one (`Recipe.growths`).
        ended: Epochs ended (evaluated, logged).
        origin: Where the run came from, for whoever resumes it; kept in the state.
        task: The network, its averaged copy, and what it draws from.
    """

    def __init__(
        self,
        task: TrainingTask,
        data: Dataset[Any],
        places: order.Order,
        recipe: Recipe,
        out: Path,
        evaluation: Iterable[Any] | None,
        accelerator: Any,
        stop: distributed.StopRequest,
        teacher: Teacher | None = None,
        augment: Callable[[Any], Any] | None = None,
    ) -> None:
        self.task, self.net = task, task.net
        self.data, self.order, self.recipe, self.out = data, places, recipe, out
        self.evaluation, self.accelerator, self.stop = evaluation, accelerator, stop
        self.rank, self.augment = accelerator.process_index, augment
        self.step = self.begun = self.ended = 0
        self.losses, self.journal, self.origin = Losses(), Journal(out / run_files.LOG_FILE), dict[str, Any]()
        self.before: Sequence[Point] = ()
        self.classes = classes_of(self.net.model)  # a wrapper around one model says nothing of them
        self.target = task.target() or target_of(recipe, self.classes)
        self.teacher = None if teacher is None else teacher.to(accelerator.device, self.classes)
        self.network = followed(self.net, self.teacher) if isinstance(self.target, Following) else self.net
        optimiser, self.schedule = optimiser_and_schedule(self.net.model, recipe, places.step_images, places.steps)
        trained = CompiledSizes(self.network) if recipe.compile_sizes else self.network
        self.model, self.optimiser = distributed.prepare(accelerator, trained, optimiser)
        if recipe.tracker != "none":
            with self.tracking():
                accelerator.init_trackers("stratavit")

    # ---- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from where it stands to the end."""
        if self.step == 0:
            self.save()
            if self.before:
                self.log_curve(self.before)
        with overall("train", self.recipe.epochs - self.ended, silent=self.rank > 0) as begin:
            while self.ended < self.recipe.epochs and not self.task.finished:
                begin(1.0)
                self.train_epoch(self.ended)
                if self.to_evaluate():  # which may last long
                    self.save()
                    self.pause(at_once=True)
                self.end_epoch()
        self.finish()

    def train_epoch(self, epoch: int) -> None:
        """Runs the steps of an epoch that are left."""
        started, first = time.perf_counter(), self.step - epoch * self.order.steps
        pin = self.accelerator.device.type == "cuda"
        batches = iter(order.loader(self.data, self.order, epoch, self.rank, first, self.recipe.workers, pin))
        self.model.train(self.target.dropout)
        try:
            for _ in track(range(first, self.order.steps), "train"):
                self.begin_stage()
                self.update([next(batches) for _ in range(self.recipe.accumulate)])
                if self.recipe.save_steps and self.step % self.recipe.save_steps == 0:
                    self.save()
                self.pause()
        finally:
            order.close(batches)
        self.look()
        self.seconds = time.perf_counter() - started

    def begin_stage(self) -> None:
        """Where a stage begins, measures means and importance on the weights as they are, and lets the list grow."""
        stage = self.step * self.recipe.growths // self.order.steps
        if self.begun > stage:
            return
        order.seed_all(self.recipe.seed, "stage", stage)  # proxy images may be augmented
        self.task.begin_stage(stage)
        rest(self.evaluation, self.task.proxy)
        self.begun = stage + 1

    def pause(self, at_once: bool = False) -> None:
        """Saves and stops if that was asked for; several processes look together, every few steps or `at_once`."""
        if self.stop.agreed(self.accelerator, self.step, at_once):
            self.save()
            total = self.order.steps * self.recipe.epochs
            raise self.stop.by(f"stopped after step {self.step} of {total}; resume {self.out} to go on")

    def update(self, batches: list[Any]) -> None:
        """One step of the optimiser: every batch draws its own prefixes, gradients are averaged."""
        self.schedule.step_update(self.step)
        for number, batch in enumerate(batches):
            order.seed_all(self.recipe.seed, "step", self.step, number, self.rank)
            images, target = self.prepare(batch)
            drawn = self.draw(number)
            learners = self.learners(drawn)
            soft = self.taught(images, target) if any(learners) else target
            for turn, (one, learns) in enumerate(zip(drawn, learners, strict=True), start=1):
                last = number + 1 == len(batches) and turn == len(drawn)
                self.learn(images, soft if learns else target, one, 1 / (len(drawn) * len(batches)), last)
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.task.ema is not None:
            self.task.ema.update(self.net)
        self.step += 1
        if self.step % self.recipe.log_steps == 0:
            self.look()

    def prepare(self, batch: Any) -> tuple[Tensor, Tensor]:
        """A batch on the device, augmented there if it was not before, and mixed."""
        images, labels = unpack(batch if self.augment is None else self.augment(batch), "train")
        check_images(self.net.model, images, "train")
        if not self.target.labelled:
            labels = torch.zeros(len(images), dtype=torch.long)
        elif labels is None:
            raise StrataViTError("train: the training data has no labels; it must return (image, label)")
        else:
            check_labels(labels, self.classes)
        device = self.accelerator.device
        return self.target.mix(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    def draw(self, number: int) -> list[SampledNetwork]:
        """Sub-networks that batch `number` of this step runs on this process."""
        return self.task.draw(stream(self.recipe.seed, "draw", self.step, number, self.rank))

    def learners(self, drawn: list[SampledNetwork]) -> list[bool]:
        """Which of the networks learn from the teacher, or from the full network, which teaches smaller ones only."""
        if self.target.labelled and not (self.recipe.distil or self.recipe.distil_blocks):
            return [False] * len(drawn)
        return [self.teacher is not None or one.macs < self.task.full_macs for one in drawn]

    @torch.no_grad()
    def taught(self, images: Tensor, target: Tensor) -> Any:
        """The target with what the teacher, or the full network, makes of images, and its blocks if they count."""
        with self.accelerator.autocast():
            output = self.network(images) if self.teacher is None else self.teacher(images)
        return self.target.taught(target, output, self.recipe.distil)

    def learn(self, images: Tensor, target: Any, drawn: SampledNetwork, share: float, last: bool) -> None:
        """Forward and backward at a sub-network; processes exchange gradients in the last pass of a step."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss = self.target.loss(self.model(images, drawn.spec), target)
            self.accelerator.backward(loss * share)
        self.losses.add(self.step, drawn, loss)

    # ---- evaluation and log -----------------------------------------------------------------------

    def to_evaluate(self) -> bool:
        """Whether the ladder of budgets is evaluated at the end of this epoch."""
        return self.evaluation is not None and self.recipe.due(self.ended + 1, self.recipe.eval_every)

    def end_epoch(self) -> None:
        """Evaluates if it is time, writes the log and the state."""
        evaluates, self.ended = self.to_evaluate(), self.ended + 1
        row = {"loss": self.losses.take_mean(), "lr": self.rate, **self.task.facts(), "seconds": round(self.seconds, 3)}
        self.log("epoch", row, row)
        if evaluates:
            order.seed_all(self.recipe.seed, "evaluation", self.ended)
            assert self.evaluation is not None
            self.log_curve(self.task.evaluate(self.evaluation))
        if self.recipe.due(self.ended, self.recipe.save_every):
            self.save()

    def log_curve(self, points: Sequence[Point]) -> None:
        """Writes an evaluation into the log; that before the first step is one of epoch 0."""
        rest(self.evaluation, self.task.proxy)
        self.log("eval", {"points": [asdict(p) for p in points]}, {f"top1 at {p.asked}": p.top1 for p in points})

    def log(self, kind: str, row: dict[str, Any], values: dict[str, float]) -> None:
        """Writes a row of the log, and values for the tracker."""

        def write() -> None:
            self.journal.append({"kind": kind, "epoch": self.ended, "step": self.step, **row})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            when = f"epoch {self.ended} of {self.recipe.epochs}" if self.ended else "before training"
            print(f"{when}: {shown}", file=sys.stderr)
            with self.tracking():
                self.accelerator.log(values, step=self.step)

        distributed.on_main(self.accelerator, write)

    def tracking(self) -> AbstractContextManager[None]:
        """Around what a tracker writes."""
        hint = run_files.resume_hint(self.out)
        return readable_errors(self.out, f"the tracker ({self.recipe.tracker}) failed; {hint}")

    @property
    def rate(self) -> float:
        """Learning rate of the last step, before any multiple for some of the weights."""
        group = self.schedule.optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    def look(self) -> None:
        """Looks at the losses since the last look; one that is not finite is an error."""
        bad = self.losses.look()
        if bad is None:
            return
        step, drawn, loss = bad
        self.schedule.step_update(step)
        name = "sub-network" if drawn.position is None else f"prefix {drawn.position}"
        raise StrataViTError(
            f"train: the loss is {loss:g} at step {step} ({name}, {drawn.macs / self.task.full_macs:.0%} of MACs, "
            f"learning rate {self.rate:.3g}) or not finite on another process; "
            f"{run_files.resume_hint(self.out, '')}: train again with a lower lr or with clip"
        )

    # ---- what is kept and written ---------------------------------------------------------

    def save(self) -> None:
        """Writes the state."""
        self.look()
        scaler = self.accelerator.scaler
        state = {
            "recipe": self.recipe.to_dict(),
            **self.identity(),
            "epoch_images": self.order.count,
            "origin": self.origin,
            "first_curve": [asdict(point) for point in self.before],
            "step": self.step,
            "begun": self.begun,
            "ended": self.ended,
            "loss": [self.losses.sum, self.losses.count],
            **self.task.state(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        distributed.on_main(self.accelerator, lambda: write_state(self.out, state))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the state."""
        return {
            "kind": self.task.kind,
            "processes": self.accelerator.num_processes,
            "images": self.order.images,
            "teacher": None if self.teacher is None else self.teacher.name,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state; one of another model, data set, method, teacher or number of processes is refused."""
        with run_files.checkpoint_errors(self.out):
            for key, value in self.identity().items():
                if state[key] != value:
                    raise StrataViTError(f"{self.out} was trained with {key} = {state[key]}; now it is {value}")
            self.task.restore(state)
            self.optimiser.load_state_dict(state["optimiser"])
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])  # pragma: no cover: float16 on a GPU
            self.step, self.begun, self.ended = (int(state[key]) for key in ("step", "begun", "ended"))
            self.losses.sum, self.losses.count = state["loss"]
            self.origin = self.origin or state.get("origin") or {}
            self.before = [Point(**row) for row in state.get("first_curve", [])]
        distributed.on_main(self.accelerator, lambda: self.journal.rewind(self.ended if self.step else -1))

    def finish(self) -> None:
        """Gives the network the weights to keep, and writes it with the last evaluation."""
        order.seed_all(self.recipe.seed, "end")
        self.task.graduate({"recipe": self.recipe.to_dict(), "steps": self.step, **self.identity()})
        distributed.unwrap(self.accelerator, self.model)  # what is saved must compute the same as what is loaded
        distributed.on_main(self.accelerator, self._publish)

    def _publish(self) -> None:
        self.task.publish(self.out, with_before(last_curve(self.journal.rows()), self.before))
