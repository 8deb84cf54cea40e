"""Latency and throughput of small models next to the dense one, each as a ratio in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.table import Table
from torch import nn

from stratavit.errors import StrataViTError
from stratavit.evaluation import latency, turns
from stratavit.evaluation.latency import Setting, Timing
from stratavit.models.cost import linear_macs
from stratavit.utils.model import is_super_network
from stratavit.utils.progress import track
from stratavit.utils.text import human


@dataclass(frozen=True)
class Row:
    """One model in one setting.

    Attributes:
        model: Its name.
        runtime, batch_size, threads: The setting.
        dtype: The type that it ran in.
        median_ms, p90_ms, images_per_second: See `Timing`.
        speedup: Dense median over its own.
        spread: Standard error of `speedup`.
        ideal: Dense MACs over its own.
        macs: Per image, as budgets count them.
        macs_with_attention: The same with the products QK^T and AV.
        unrest: By how much passes of the first model differ, see `turns.unrest`.
    """

    model: str
    runtime: str
    batch_size: int
    threads: int
    dtype: str
    median_ms: float
    p90_ms: float
    images_per_second: float
    speedup: float
    spread: float
    ideal: float
    macs: int
    macs_with_attention: int
    unrest: float


def bench(models: Mapping[str, nn.Module], image_size: Sequence[int], settings: Sequence[Setting]) -> list[Row]:
    """Times models side by side: in every setting they take turns, until their ratios are known well enough.

    Args:
        models: Name -> model; the first is the one that others are compared with.
        image_size: Channels, height, width.
        settings: Each of them is run with every model, up to `turns.MOST` times its seconds on a busy machine.

    Returns:
        One row for every model and setting: times in milliseconds, speed-up with its spread, MACs per image.

    Raises:
        StrataViTError: No model or setting, or one that cannot be run, see `latency.time_model`.
    """
    if not models or not settings:
        raise StrataViTError("bench: give at least one model and one setting")
    if any(is_super_network(model) for model in models.values()):
        raise StrataViTError("bench: a super-network has many sizes; extract those to time")
    for setting in settings:
        for model in models.values():
            setting.check_device(model)
    size = (image_size[0], image_size[1], image_size[2])
    macs = {name: [linear_macs(model, size, attention=x) for x in (False, True)] for name, model in models.items()}
    rows: list[Row] = []
    session_of = cache(lambda name, threads: latency.session_of(models[name], size, threads))
    for setting in track(settings, "time"):
        threads = setting.used_threads
        runs = [
            latency.runner(model, size, setting, session_of(name, threads) if setting.runtime == "onnx" else None)
            for name, model in models.items()
        ]
        times = turns.take_turns(runs, setting)
        rows += [_row(models, name, macs, setting, own, times[0]) for name, own in zip(models, times, strict=True)]
    return rows


def _row(
    models: Mapping[str, nn.Module],
    name: str,
    macs: Mapping[str, Sequence[int]],
    setting: Setting,
    own: turns.Rounds,
    first: turns.Rounds,
) -> Row:
    ratio, timing = turns.Ratio.of(own, first), Timing.of(turns.flat(own), setting.batch_size)
    return Row(
        model=name,
        runtime=setting.runtime,
        batch_size=setting.batch_size,
        threads=setting.used_threads,
        dtype=str(setting.dtype_of(models[name])).removeprefix("torch."),
        median_ms=timing.median_ms,
        p90_ms=timing.p90_ms,
        images_per_second=timing.images_per_second,
        speedup=1 / ratio.value,
        spread=ratio.spread / ratio.value,
        ideal=next(iter(macs.values()))[0] / macs[name][0],
        macs=macs[name][0],
        macs_with_attention=macs[name][1],
        unrest=turns.unrest(first),
    )


def tables(rows: Sequence[Row], device: str) -> list[Any]:
    """The rows as tables for the terminal, one for each setting; and a line if the machine was busy."""
    views: dict[str, Any] = {}
    for row in rows:
        title = f"{row.runtime}, {row.dtype}, batch {row.batch_size}, {row.threads} threads, {device}"
        if title not in views:
            views[title] = Table(title=title)
            for heading in ("model", "MACs", "median ms", "p90 ms", "images/s", "speed-up", "MACs ratio"):
                views[title].add_column(heading, justify="left" if heading == "model" else "right")
        numbers = (f"{row.median_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.images_per_second:.1f}")
        speedup = f"{row.speedup:.2f} ± {row.spread:.2f}" if row.spread else f"{row.speedup:.2f}"
        views[title].add_row(row.model, human(row.macs), *numbers, speedup, f"{row.ideal:.2f}")
    note = turns.noise_note(max(row.unrest for row in rows))
    return [*views.values(), *([note] if note else [])]
