"""Progressive Importance-Aware Dropout (PIAD): draw a prefix of a growing list, run it, train the full weights.

Source: method section 2 (arXiv 2511.11683). Distribution, precision and trackers are Hugging Face Accelerate's;
optimiser, schedule, mixup and weight averaging are timm's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stratavit import checkpoint, order, processes, report
from stratavit.augment import Target, drop_path
from stratavit.batches import check_labels, unpack
from stratavit.checkpoint import Journal, publish, read_state, write_state
from stratavit.errors import StrataViTError
from stratavit.folders import check_free
from stratavit.optimising import Losses, optimiser_and_schedule
from stratavit.pupil import Pupil
from stratavit.recipe import Recipe
from stratavit.sampling import Drawn, stream
from stratavit.supernet import SuperNet


def train_piad(
    net: SuperNet,
    train_data: Dataset[Any],
    recipe: Recipe | None,
    out: str | Path,
    proxy_loader: Iterable[Any],
    eval_loader: Iterable[Any] | None = None,
    resume: bool = False,
    cpu: bool = False,
) -> SuperNet:
    """Trains a super-network in place, so that every prefix of its dropout list is a good network.

    Runs in one process, or in many under ``accelerate launch``; each draws its own prefixes. SIGTERM and Ctrl-C
    save the state and stop. `out` gets ``state.pt``, ``log.jsonl``, the trained super-network (`SuperNet.load`) and,
    with `eval_loader`, ``curve.csv`` and ``curve.png``.

    Second moments and the final mean of an untrained network are dropped. While training, cut channels count as zero
    (``method="paper"``) or are replaced by their mean, measured at the start of every epoch (default).

    Args:
        net: A super-network, best contracted (`SuperNet.contract`).
        train_data: Of known length, gives ``(image [C, H, W], label)``, augmented by itself if at all.
        recipe: Every number. None takes the interrupted run's, or the paper's for DeiT-S. A resumed run may change only
            what has no effect on the weights, such as ``workers``.
        out: Folder of the run; must be empty or absent, unless `resume`.
        proxy_loader: Images that importance and means are measured on, in the evaluation transform; run
            through several times per epoch while the list grows.
        eval_loader: Labelled images to evaluate the ladder of budgets on.
        resume: Go on with the interrupted run in `out`; on the CPU the result is bit-identical to that of a run that
            was not interrupted.
        cpu: Train on the CPU even where there is an accelerator.

    Returns:
        `net`, in eval mode, with the weights that `Recipe.keep` names and the finished list.

    Raises:
        StrataViTError: Bad data or recipe, a loss that is not finite (the last state stays), Accelerate is missing.
        ArtifactError: `out` is not free, holds no state to resume, or cannot be written.
        KeyboardInterrupt: Stopped on request; the state is saved.
    """
    folder = Path(out)
    state = read_state(folder) if resume else None
    begun = None if state is None else Recipe.from_dict(state["recipe"], str(folder))
    recipe = begun.resumed(recipe, str(folder)) if begun else recipe or Recipe()
    accelerator = processes.accelerator(recipe, folder, cpu)
    if state is None:
        processes.on_main(accelerator, lambda: check_free(folder, False).mkdir(parents=True, exist_ok=True))
    with ExitStack() as stack:
        stack.enter_context(order.kept_generators())
        stack.enter_context(drop_path(net.model, recipe.drop_path))
        stop = stack.enter_context(processes.stop_on_signal())
        trainer = Trainer(net, train_data, recipe, folder, proxy_loader, eval_loader, accelerator, stop)
        stack.callback(processes.release, accelerator, trainer.model)
        if state is not None:
            trainer.restore(state)
        trainer.run()
    return net


class Trainer:
    """One training run; see `train_piad` for the arguments.

    Attributes:
        step: Steps of the optimiser done.
        begun, ended: Epochs begun (list grown, means measured) and ended (evaluated, logged).
        pupil: The network, its averaged copy and its list.
    """

    def __init__(
        self,
        net: SuperNet,
        data: Dataset[Any],
        recipe: Recipe,
        out: Path,
        proxy: Iterable[Any],
        evaluation: Iterable[Any] | None,
        accelerator: Any,
        stop: processes.StopRequest,
    ) -> None:
        self.net, self.data, self.recipe, self.out = net, data, recipe, out
        self.evaluation, self.accelerator, self.stop = evaluation, accelerator, stop
        self.rank, world = accelerator.process_index, accelerator.num_processes
        count = len(data)  # type: ignore[arg-type]
        self.order = order.Order(count, recipe.batch_size, world, recipe.accumulate, recipe.repeats, recipe.seed)
        self.total = self.order.steps * recipe.epochs
        self.step = self.begun = self.ended = 0
        self.losses = Losses()
        self.journal = Journal(out / checkpoint.LOG_FILE)
        self.target = Target(recipe, net.model.num_classes)
        self.pupil = Pupil(net, recipe, recipe.decay(self.total), proxy, accelerator)
        images = recipe.batch_size * recipe.accumulate * world
        optimiser, self.schedule = optimiser_and_schedule(net.model, recipe, images, self.order.steps)
        self.model, self.optimiser = processes.prepare(accelerator, net, optimiser)
        if recipe.tracker != "none":
            accelerator.init_trackers("stratavit")

    # ---- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from where it stands to the end."""
        if self.step == 0:
            self.save()
        while self.ended < self.recipe.epochs:
            self.begin_epoch(self.ended)
            self.train_epoch(self.ended)
            self.end_epoch()
        self.finish()

    def begin_epoch(self, epoch: int) -> None:
        """Measures means and importance on the weights as they are, and lets the list grow."""
        if self.begun > epoch:
            return  # resumed in its midst
        self.pupil.begin_epoch(epoch)
        self.begun = epoch + 1

    def train_epoch(self, epoch: int) -> None:
        """Takes the steps of an epoch that are left."""
        started, first = time.perf_counter(), self.step - epoch * self.order.steps
        pin = self.accelerator.device.type == "cuda"
        batches = iter(order.loader(self.data, self.order, epoch, self.rank, first, self.recipe.workers, pin))
        self.model.train()
        while self.step < (epoch + 1) * self.order.steps:
            self.update([next(batches) for _ in range(self.recipe.accumulate)])
            stop = self.stop.agreed(self.accelerator, self.step)
            if stop or (self.recipe.save_steps and self.step % self.recipe.save_steps == 0):
                self.save()
            if stop:
                raise KeyboardInterrupt(f"stopped after step {self.step} of {self.total}; resume {self.out} to go on")
        self.look()
        self.seconds = time.perf_counter() - started

    def update(self, batches: list[Any]) -> None:
        """One step of the optimiser: every batch draws its own prefixes, gradients are averaged."""
        self.schedule.step_update(self.step)
        for number, batch in enumerate(batches):
            order.seed_all(self.recipe.seed, "step", self.step, number, self.rank)
            images, target = self.prepare(batch)
            drawn = self.draw(number)
            answer = self.full_answer(images) if any(one.macs < self.net.macs() for one in drawn) else None
            for turn, one in enumerate(drawn, start=1):
                last = number + 1 == len(batches) and turn == len(drawn)
                soft = target
                if answer is not None and one.macs < self.net.macs():
                    soft = self.target.taught(target, answer, self.recipe.distil)
                self.learn(images, soft, one, 1 / (len(drawn) * len(batches)), last)
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.pupil.ema is not None:
            self.pupil.ema.update(self.net)
        self.step += 1
        if self.step % self.recipe.log_steps == 0:
            self.look()

    @torch.no_grad()
    def full_answer(self, images: Tensor) -> Tensor | None:
        """Logits of the full network, which teaches smaller prefixes; None if it does not."""
        if not self.recipe.distil:
            return None
        logits: Tensor = self.net(images)
        return logits

    def learn(self, images: Tensor, target: Tensor, drawn: Drawn, share: float, last: bool) -> None:
        """Forward and backward at a sub-network; processes exchange gradients in the last pass of a step."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss = self.target.loss(self.model(images, drawn.spec), target)
            self.accelerator.backward(loss * share)
        self.losses.add(self.step, drawn, loss)

    def draw(self, number: int) -> list[Drawn]:
        """Sub-networks that batch `number` of this step runs on this process."""
        return self.pupil.draw(stream(self.recipe.seed, "draw", self.step, number, self.rank))

    def prepare(self, batch: Any) -> tuple[Tensor, Tensor]:
        """A batch on the device, mixed."""
        images, labels = unpack(batch)
        if labels is None:
            raise StrataViTError("train: the training data gives no labels; it must give (image, label)")
        check_labels(labels, self.net.model.num_classes)
        device = self.accelerator.device
        return self.target.mix(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    def end_epoch(self) -> None:
        """Evaluates if it is time, writes the log and the state."""
        self.ended += 1
        last = self.ended == self.recipe.epochs
        row = {
            "loss": self.losses.take_mean(),
            "lr": self.rate,
            "entries": len(self.pupil.entries),
            "smallest": self.pupil.smallest,
            "seconds": round(self.seconds, 3),
        }
        self.log("epoch", row, row)
        if self.evaluation is not None and (last or self.ended % self.recipe.eval_every == 0):
            points = self.pupil.evaluate(self.evaluation)
            self.log("eval", {"points": [asdict(p) for p in points]}, {f"top1 at {p.asked}": p.top1 for p in points})
        if last or self.ended % self.recipe.save_every == 0:
            self.save()

    def log(self, kind: str, row: dict[str, Any], values: dict[str, float]) -> None:
        """Writes a row of the log, and values for the tracker."""
        if self.accelerator.is_main_process:
            self.journal.append({"kind": kind, "epoch": self.ended, "step": self.step, **row})
        self.accelerator.log(values, step=self.step)

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.schedule.optimizer.param_groups[0]["lr"])

    def look(self) -> None:
        """Looks at the losses since the last look.

        Raises:
            StrataViTError: One is not finite; names step, prefix and learning rate.
        """
        bad = self.losses.look(self.accelerator)
        if bad is None:
            return
        step, drawn, loss = bad
        self.schedule.step_update(step)
        name = "sub-network" if drawn.position is None else f"prefix {drawn.position}"
        raise StrataViTError(
            f"train: the loss is {loss:g} at step {step} ({name}, {drawn.macs / self.net.macs():.0%} of MACs, "
            f"learning rate {self.rate:.3g}) or not finite on another process; the last state in {self.out} "
            "is sound: train anew with a lower lr or with clip"
        )

    # ---- what is kept and written ---------------------------------------------------------

    def save(self) -> None:
        """Writes the state."""
        self.look()
        scaler = self.accelerator.scaler
        state = {
            "recipe": self.recipe.to_dict(),
            "processes": self.accelerator.num_processes,
            "images": self.order.count,
            "method": self.net.method,
            "step": self.step,
            "begun": self.begun,
            "ended": self.ended,
            "loss": [self.losses.sum, self.losses.count],
            **self.pupil.state(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        processes.on_main(self.accelerator, lambda: write_state(self.out, state))

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            StrataViTError: It belongs to another model, data set, method or number of processes.
        """
        now = {"processes": self.accelerator.num_processes, "images": self.order.count, "method": self.net.method}
        for key, value in now.items():
            if state[key] != value:
                raise StrataViTError(f"{self.out} was trained with {key} = {state[key]}; now it is {value}")
        self.pupil.restore(state)
        self.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.begun, self.ended = state["step"], state["begun"], state["ended"]
        self.losses.sum, self.losses.count = state["loss"]
        processes.on_main(self.accelerator, lambda: self.journal.rewind(self.ended))

    def finish(self) -> None:
        """Gives the network the weights to keep and its list, and writes it."""
        self.pupil.graduate()
        self.net.provenance.pop("stratify", None)
        self.net.provenance["train"] = {
            "recipe": self.recipe.to_dict(),
            "steps": self.step,
            "images": self.order.count,
            "processes": self.accelerator.num_processes,
        }
        processes.on_main(self.accelerator, self.write_results)

    def write_results(self) -> None:
        """The super-network, and the curve of the last evaluation."""
        publish(self.net, self.out)
        measured = [row["points"] for row in self.journal.rows() if row["kind"] == "eval"]
        points = [report.Point(**point) for point in measured[-1]] if measured else []
        if points:
            report.write_csv(points, self.out / "curve.csv")
            report.plot(points, self.out / "curve.png", f"{self.net.description['architecture']}, {self.recipe.mode}")
