"""How long a model takes, pass by pass: median, 90th percentile and throughput."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, get_args

import torch
from torch import nn

from stratavit.choices import Precision as Precision
from stratavit.choices import Runtime as Runtime
from stratavit.errors import StrataViTError
from stratavit.utils.model import eval_mode, model_device, model_dtype

AT_LEAST_RUNS = 5
WARM_UP = 2  # passes: the first compiles, the second records a CUDA graph


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        batch_size: Images per pass.
        runtime: ``eager``; ``compiled`` by `torch.compile`; ``cudagraphs``, compiled and recorded as CUDA
            graphs, on CUDA only; ``onnx``, by ONNX Runtime on the CPU, in float32.
        dtype: Of weights and images; None is the model's own.
        threads: CPU threads; 0 is what torch is set to.
        seconds: Shortest time that is spent on one measurement, after warming up.
    """

    batch_size: int = 1
    runtime: Runtime = "eager"
    dtype: Precision | None = None
    threads: int = 0
    seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("threads", self.threads, 0)):
            if isinstance(value, bool) or not isinstance(value, SupportsIndex) or index(value) < least:
                raise StrataViTError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if self.runtime not in get_args(Runtime):
            raise StrataViTError(f"runtime: expected one of {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if self.dtype not in (None, *get_args(Precision)):
            raise StrataViTError(f"dtype: expected one of {', '.join(get_args(Precision))}, got {self.dtype!r}")
        if self.runtime == "onnx" and self.dtype not in (None, "float32"):
            raise StrataViTError(f"dtype: ONNX Runtime is timed in float32 only, got {self.dtype!r}")
        if not isinstance(self.seconds, float | int) or not 0 < self.seconds < float("inf"):
            raise StrataViTError(f"seconds: expected a number above 0, got {self.seconds!r}")

    def check_device(self, model: nn.Module) -> None:
        """A `StrataViTError` if a model is not where this runtime can record it: torch would run something else."""
        device = model_device(model).type
        if self.runtime == "cudagraphs" and device != "cuda":
            raise StrataViTError(f"runtime: cudagraphs needs the model on a CUDA device, it is on {device}")

    def dtype_of(self, model: nn.Module) -> torch.dtype:
        """The type that a model is run in."""
        own = torch.float32 if self.runtime == "onnx" else model_dtype(model)
        return own if self.dtype is None else getattr(torch, self.dtype)

    @property
    def used_threads(self) -> int:
        """CPU threads."""
        return self.threads or torch.get_num_threads()


@dataclass(frozen=True)
class Timing:
    """How long one pass takes.

    Attributes:
        median_ms, p90_ms: Milliseconds per batch.
        images_per_second: Images per batch over the median.
        runs: Passes timed.
    """

    median_ms: float
    p90_ms: float
    images_per_second: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float], batch_size: int) -> Timing:
        """From the time of each pass."""
        times = torch.tensor(seconds, dtype=torch.float64)
        median, p90 = (float(times.quantile(q)) for q in (0.5, 0.9))
        return cls(1000 * median, 1000 * p90, batch_size / median, len(seconds))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def time_model(model: nn.Module, image_size: Sequence[int], setting: Setting | None = None) -> Timing:
    """Times a model on the device it is on.

    Args:
        model: From images to logits; in eval mode meanwhile, unchanged.
        image_size: Channels, height, width.
        setting: How it is run; one image, eager, if None.

    Returns:
        Median and 90th percentile in milliseconds per batch, images per second, number of passes.

    Raises:
        StrataViTError: The runtime needs packages that are not there, or cannot run the model.
    """
    setting = setting or Setting()
    return Timing.of(pass_times(runner(model, image_size, setting), setting, AT_LEAST_RUNS), setting.batch_size)


class TimedCall(NamedTuple):
    """One pass over a batch, to be timed in inference mode, the model in eval mode."""

    run: Callable[[], Any]
    model: nn.Module


def session_of(model: nn.Module, image_size: Sequence[int], threads: int) -> Any:
    """The model in ONNX Runtime, any batch size."""
    from stratavit.interop.export import export
    from stratavit.interop.onnx_file import onnx_session

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(copy.deepcopy(model).float(), file, "onnx", noise(1, image_size))
        return onnx_session(file, threads)


def noise(batch_size: int, image_size: Sequence[int]) -> torch.Tensor:
    """Images to run a model on."""
    return torch.randn(batch_size, *image_size, generator=torch.Generator().manual_seed(0))


def runner(model: nn.Module, image_size: Sequence[int], setting: Setting, session: Any | None = None) -> TimedCall:
    """One pass over a batch of noise, warmed up; a `session` of `session_of` saves exporting the model again.

    Raises:
        StrataViTError: The model cannot be run in this setting.
    """
    from stratavit.interop.onnx_file import INPUT, without_their_warnings

    images = noise(setting.batch_size, image_size)
    setting.check_device(model)
    dtype, timed = setting.dtype_of(model), model
    try:
        with without_their_warnings():
            if setting.runtime == "onnx":
                session = session or session_of(model, image_size, setting.used_threads)
                run = partial(session.run, None, {INPUT: images.numpy()})
            else:
                timed = model if dtype is model_dtype(model) else copy.deepcopy(model).to(dtype)
                run = partial(_called(timed, setting.runtime), images.to(model_device(model), dtype))
            with eval_mode(timed), torch.inference_mode():
                for _ in range(WARM_UP):
                    run()
    except StrataViTError:
        raise
    except Exception as error:  # what an exporter, a compiler or a missing kernel raises is of any kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StrataViTError(f"the model cannot be run {setting.runtime} in {dtype} here: {reason}") from error
    return TimedCall(run, timed)


def _called(model: nn.Module, runtime: Runtime) -> Callable[[torch.Tensor], Any]:
    """The model as a runtime of torch calls it."""
    if runtime == "eager":
        return model
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if runtime == "cudagraphs" else None)


def pass_times(one: TimedCall, setting: Setting, at_least: int) -> list[float]:
    """Seconds of each pass, `at_least` of them or more, each synchronised with the device."""
    times: list[float] = []
    device = model_device(one.model)
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.used_threads)
    try:
        with eval_mode(one.model), torch.inference_mode():
            while len(times) < at_least or sum(times) < setting.seconds:
                started = _clock(device)
                one.run()
                times.append(_clock(device) - started)
    finally:
        torch.set_num_threads(threads)
    return times


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()  # torch.cuda, torch.mps, torch.xpu
    return time.perf_counter()


def in_turns(passes: Sequence[TimedCall], setting: Setting, rounds: int) -> list[Timing]:
    """Times several in turns, so that a machine that slows down slows all; `seconds` are for all rounds together."""
    part = dataclasses.replace(setting, seconds=setting.seconds / rounds)
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(rounds):
        for known, one in zip(times, passes, strict=True):
            known += pass_times(one, part, AT_LEAST_RUNS)
    return [Timing.of(known, setting.batch_size) for known in times]
