"""Training processes: one, or many under ``accelerate launch`` or ``torchrun``; what they agree on; how they stop."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stratavit.errors import StrataViTError, reason_of
from stratavit.training.recipe import Recipe
from stratavit.training.run_files import resume_hint
from stratavit.utils.signals import Terminated

T = TypeVar("T")
CHECK_EVERY = 8  # steps between agreements of several processes on whether to stop: an agreement waits for all


def launched() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accelerator(recipe: Recipe, out: Path, cpu: bool) -> Any:
    """Hugging Face's `Accelerator` for a recipe; `cpu` leaves other devices alone, the tracker writes to `out`.

    Raises:
        StrataViTError: Accelerate or the tracker is not installed, or the precision is not available here.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise StrataViTError("training needs Hugging Face Accelerate: pip install 'stratavit[train]'") from error
    wanted = launched()
    fresh = not getattr(AcceleratorState, "_shared_state", None)
    # a prefix skips modules, so not every weight has a gradient; buffers are kept equal by `broadcast`
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        found = Accelerator(
            mixed_precision=None if recipe.precision == "auto" else recipe.precision,
            cpu=cpu or (wanted > 1 and not torch.cuda.is_available()),  # it joins processes on CPUs only if asked to
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=str(out),
            kwargs_handlers=[parallel],
        )
    except ValueError as error:
        raise StrataViTError(f"train: Accelerate cannot start: {error}") from error
    if found.num_processes < wanted:
        raise StrataViTError(
            f"train: {wanted} processes were launched, but Accelerate joined {found.num_processes}; use "
            "`accelerate launch --multi_gpu`, or `torchrun` with --device cpu"
        )
    found.is_ours = fresh and found.num_processes == 1
    if recipe.tracker != "none" and not found.log_with:
        reset_accelerator(found)
        raise StrataViTError(
            f"train: the tracker {recipe.tracker!r} is not installed; install it (TensorBoard: pip install "
            "'stratavit[train]'), or set tracker to 'none'"
        )
    if found.num_processes > 1:
        atexit.register(leave_process_group)
    return found


def reset_accelerator(accelerator: Any) -> None:
    """Lets the next run in this process choose its own precision and device, unless others use Accelerate's state."""
    if accelerator.is_ours:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def leave_process_group() -> None:
    """Takes the process out of its group: one that exits while its group's threads run may abort after a good run."""
    if _joined():
        torch.distributed.destroy_process_group()


def prepare(accelerator: Any, *parts: Any) -> Any:
    """Accelerate's `prepare`, without its warning on an argument that newer versions of torch have renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(*parts)


def release(accelerator: Any, model: Any) -> None:
    """Closes trackers and removes Accelerate's wrappers from the model; the processes stay joined for the next run."""
    unwrap(accelerator, model)
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except (OSError, RuntimeError) as error:  # of a run that has its result, or failed already
            print(f"train: the tracker's last numbers are lost: {reason_of(error)}", file=sys.stderr)


def unwrap(accelerator: Any, model: Any) -> None:
    """Lets the model run in its own precision again."""
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):  # bound to the object by Accelerate where precision is mixed
        vars(plain).pop(name, None)


def broadcast(value: Any) -> Any:
    """The first process's value of a plain object, on all of them, whoever joined them."""
    box = [value]
    if _joined():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """The first process's tensor on all of them; each has one of the same shape."""
    received = tensor.contiguous()
    if _joined():
        torch.distributed.broadcast(received, src=0)
    return received


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather(items: list[T]) -> list[T]:
    """The items of all processes, one process after another, on all of them."""
    from accelerate.utils import gather_object

    return list(gather_object(items))


def on_main(accelerator: Any, work: Callable[[], None]) -> None:
    """Runs `work` on the first process; if it raises a `StrataViTError`, all processes do."""
    failure: StrataViTError | None = None
    try:
        if accelerator.is_main_process:
            work()
    except StrataViTError as error:
        failure = error
    message = broadcast(None if failure is None else str(failure))
    if message is not None:
        raise failure or StrataViTError(message)


@contextmanager
def explained_ends(accelerator: Any, out: Path) -> Iterator[None]:
    """Says what a second Ctrl-C, or the end of another process of the training, leaves behind.

    Raises:
        StrataViTError: Another process has gone; torch reports that wherever one waits for it.
        KeyboardInterrupt: Interrupted at once.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if str(stop):
            raise
        raise type(stop)(f"interrupted at once; {resume_hint(out)}") from stop
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not lost:
            raise
        raise StrataViTError(
            "train: another process of this training has gone, or cannot be reached; "
            + resume_hint(out, f", resume it with {accelerator.num_processes} processes")
        ) from error


class StopRequest:
    """Whether this process was asked to stop, and what its caller raises then."""

    asked = False
    by: type[KeyboardInterrupt] = KeyboardInterrupt

    def agreed(self, accelerator: Any, step: int, at_once: bool = False) -> bool:
        """Whether any process was asked; several look every few steps only, all at the same ones, or `at_once`."""
        if accelerator.num_processes == 1:
            return self.asked
        if step % CHECK_EVERY and not at_once:
            return False
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum"))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGTERM and the first Ctrl-C into a request to stop; the second Ctrl-C interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        request.asked = True
        request.by = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        for number in before:
            signal.signal(number, handle)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
