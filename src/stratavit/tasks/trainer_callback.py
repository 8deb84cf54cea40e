"""PIAD in Hugging Face's `Trainer`."""

from __future__ import annotations

from typing import Any

from stratavit.errors import StrataViTError
from stratavit.tasks.own_loop import PrefixCallback


def _base() -> Any:
    """The library's class, or `object` where that is not installed, which is said where a callback is made."""
    try:
        from transformers import TrainerCallback
    except ImportError:
        return object
    return TrainerCallback


_BASE: Any = _base()

KEY = "stratavit"  # of our state in the Trainer's, which is saved and read with every checkpoint


class SuperNetTrainerCallback(PrefixCallback, _BASE):
    """Trains a super-network at every size in Hugging Face's `Trainer`, whose loop and loss stay as they are.

    The model of the Trainer holds one `SuperNet` and calls it as ``net(images)``. In training steps such a call runs
    the prefix of the dropout list that was drawn for the batch, the same on every process. Without gradients, or
    outside of a training step, it runs the full size, and ``net(images, spec)`` runs what it says; ``{}`` is the full
    size. One size is drawn per batch.

    The list grows as in `train_piad`: along the network's own, or measured at the smallest size so far. Whenever it
    grows, and at every checkpoint, means of cut channels are measured on the proxy images. Checkpoints hold the list
    and what draws follow from. After training the network is in eval mode, with the finished list.

    Args:
        proxy: Batches to measure on, run through several times, best those of `SuperNet.contract`.
        out: Folder for the super-network (`SuperNet.load`), written at every checkpoint and at the end, in place of
            what it held; absent or empty, unless the training is resumed. None writes nothing.
        config: Keys of `Recipe`: ``seed``, ``sampling`` (``uniform`` or ``budget``), ``reduction``, ``list_source``,
            ``compensation``, ``axes``, ``head_dim_unit``, ``mlp_units``, ``objective``, ``measure``.
        stages: Times that the list grows until it is finished.
        stage_steps: Steps of the optimiser between them; None: the list is finished after half of all steps.
        overwrite: Replace what is in `out`.

    Raises:
        StrataViTError: transformers is not installed, or bad options.
    """

    base, libraries, batch = _BASE, ("transformers",), 0
    needs = "this callback needs transformers: pip install 'stratavit[transformers]' 'stratavit[train]'"

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Training begins, or goes on from a checkpoint."""
        if args.n_gpu > 1:
            raise StrataViTError(
                f"the Trainer would split every batch over {args.n_gpu} GPUs in one process, where draws have no "
                "effect; use torchrun or accelerate launch, or one GPU"
            )
        own = state.stateful_callbacks.get(KEY) if state.global_step else None
        main = state.is_world_process_zero
        self.training.begin(model, state.max_steps, state.global_step, main, [args.output_dir], own)
        state.stateful_callbacks[KEY] = self.training.state

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first batch of a step."""
        self.batch = 0
        self._draw(state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another batch of the same step (gradient accumulation)."""
        self.batch += 1
        self._draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ended; an evaluation may follow."""
        self.training.end_batch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        self.training.keep(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training has ended."""
        self.training.finish(state.global_step)

    def _draw(self, state: Any) -> None:
        self.training.begin_batch(state.global_step, state.global_step, self.batch)
        state.stateful_callbacks[KEY] = self.training.state
