"""PIAD in Lightning's `Trainer`."""

from __future__ import annotations

from typing import Any

from stratavit.tasks.own_loop import PrefixCallback


def _base() -> Any:
    """The library's class, or `object` where that is not installed, which is said where a callback is made."""
    try:
        from lightning.pytorch import Callback
    except ImportError:
        return object
    return Callback


_BASE: Any = _base()


class SuperNetLightningCallback(PrefixCallback, _BASE):
    """Trains a super-network at every size in Lightning's `Trainer`; the `LightningModule` stays as it is.

    The module holds one `SuperNet` and calls it as ``self.net(images)``; everything else is as in
    `SuperNetTrainerCallback`.

    Args:
        proxy, out, config, stages, stage_steps, overwrite: See `SuperNetTrainerCallback`.

    Raises:
        StrataViTError: Lightning is not installed, or bad options.
    """

    base, libraries, batches = _BASE, ("lightning",), 0
    needs = "this callback needs Lightning: pip install 'stratavit[lightning]'"
    _loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Training begins, or goes on from a checkpoint."""
        state, self._loaded = self._loaded, None
        self.batches = 0 if state is None else state["batches"]
        places = [trainer.default_root_dir, *(getattr(one, "dirpath", None) for one in trainer.checkpoint_callbacks)]
        folders, steps = [place for place in places if place], trainer.estimated_stepping_batches
        self.training.begin(pl_module, steps, trainer.global_step, trainer.is_global_zero, folders, state)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch begins."""
        self.training.begin_batch(trainer.global_step, self.batches)
        self.batches += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch ended; an evaluation may follow."""
        self.training.end_batch()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is written."""
        self.training.keep(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training has ended."""
        self.training.finish(trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training has failed, or was interrupted."""
        self.training.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same sizes."""
        return {**self.training.state, "batches": self.batches} if self.training.state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint as soon as training begins."""
        self._loaded = state_dict
