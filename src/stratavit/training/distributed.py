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


def accelerator(recipe: Recipe, out: Path, cpu: bool) -> Any:
    """Hugging Face's `Accelerator` for a recipe.

    Args:
        recipe: Precision and tracker.
        out: Folder for the tracker's files.
        cpu: Train on the CPU even where there is an accelerator.

    Raises:
        StrataViTError: Accelerate or the tracker is not installed, or the precision cannot be had here.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise StrataViTError("training needs Hugging Face Accelerate: pip install 'stratavit[train]'") from error
    if recipe.tracker == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise StrataViTError(
                "the tracker needs TensorBoard: pip install 'stratavit[train]', or set tracker to 'none'"
            ) from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.cuda.is_available():
        cpu = True  # Accelerate joins processes on CPUs only when told
    # a prefix skips modules, so not every weight has a gradient; buffers are kept equal by `broadcast`
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    fresh = not getattr(AcceleratorState, "_shared_state", None)
    try:
        found = Accelerator(
            mixed_precision=None if recipe.precision == "auto" else recipe.precision,
            cpu=cpu,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=str(out),
            kwargs_handlers=[parallel],
        )
    except ValueError as error:
        raise StrataViTError(f"train: Accelerate cannot start: {error}") from error
    if found.num_processes < launched:
        raise StrataViTError(
            f"train: {launched} processes were launched, but Accelerate joined {found.num_processes}; use "
            "`accelerate launch --multi_gpu`, or `torchrun` with --device cpu"
        )
    found.is_ours = fresh and found.num_processes == 1
    if recipe.tracker != "none" and not found.log_with:
        reset_accelerator(found)
        raise StrataViTError(f"train: the tracker {recipe.tracker!r} is not installed; install it, or set it to 'none'")
    if found.num_processes > 1:
        atexit.register(leave_process_group)
    return found


def reset_accelerator(accelerator: Any) -> None:
    """Lets the next run in this process choose its precision and device anew, unless others use Accelerate's state."""
    if accelerator.is_ours:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def leave_process_group() -> None:
    """Takes the process out of its group: one that exits while its group's threads run may abort after a good run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(accelerator: Any, *parts: Any) -> Any:
    """Accelerate's `prepare`, without its warning on an argument that newer versions of torch call otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(*parts)


def release(accelerator: Any, model: Any) -> None:
    """Closes trackers and takes Accelerate's wrappers off the model; the processes stay joined for what comes next."""
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


def broadcast(accelerator: Any, value: Any) -> Any:
    """The first process's value of a plain object, on all of them."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    holder = [value]
    broadcast_object_list(holder)
    return holder[0]


def broadcast_tensor(accelerator: Any, tensor: Tensor) -> Tensor:
    """The first process's tensor on all of them; each gives one of the same shape."""
    if accelerator.num_processes == 1:
        return tensor
    from accelerate.utils import broadcast as broadcast_parts

    received: Tensor = broadcast_parts(tensor.contiguous())
    return received


def gather(accelerator: Any, items: list[T]) -> list[T]:
    """The items of all processes, one process after another, on all of them."""
    if accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))


def on_main(accelerator: Any, work: Callable[[], None]) -> None:
    """Runs `work` on the first process; where it fails for a reason of the user's, all processes say so.

    Raises:
        StrataViTError: As `work` raised it.
    """
    failure: StrataViTError | None = None
    if accelerator.is_main_process:
        try:
            work()
        except StrataViTError as error:
            failure = error
    message = broadcast(accelerator, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise StrataViTError(message)


@contextmanager
def raise_on_all_ranks(accelerator: Any, out: Path) -> Iterator[None]:
    """Says when another process of the training is gone, which torch tells wherever one waits for it.

    Raises:
        StrataViTError: It is.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not lost:
            raise
        raise StrataViTError(
            "train: another process of this training has gone, or cannot be reached; "
            + resume_hint(out, f", resume it with {accelerator.num_processes} processes")
        ) from error


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        asked: Whether this process was.
        by: What its caller raises then.
    """

    def __init__(self) -> None:
        self.asked = False
        self.by: type[KeyboardInterrupt] = KeyboardInterrupt

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
