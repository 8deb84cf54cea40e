"""Latency and throughput of small models next to the dense one, each as a ratio in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rich.table import Table
from torch import nn

from stratavit.errors import StrataViTError
from stratavit.evaluation import latency
from stratavit.evaluation.latency import Setting
from stratavit.models.cost import linear_macs
from stratavit.utils.model import is_super_network
from stratavit.utils.progress import track
from stratavit.utils.text import human

ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One model in one setting.

    Attributes:
        model: Its name.
        runtime, batch_size, threads: The setting.
        dtype: The type that it ran in.
        median_ms, p90_ms, images_per_second: See `Timing`.
        speedup: Dense median over its own.
        ideal: Dense MACs over its own, attention products counted.
        macs: Per image, attention products counted.
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
    ideal: float
    macs: int


def bench(
    models: Mapping[str, nn.Module], image_size: Sequence[int], settings: Sequence[Setting], rounds: int = ROUNDS
) -> list[Row]:
    """Times models side by side: in every setting they take turns, so that a machine that slows down slows all.

    Args:
        models: Name -> model; the first is the one that others are compared with.
        image_size: Channels, height, width.
        settings: Each of them is run with every model.
        rounds: Turns of every model.

    Returns:
        One row for every model and setting: times in milliseconds, speed-up, MACs per image.

    Raises:
        StrataViTError: No model or setting, or one that cannot be run, see `latency.time_model`.
    """
    if not models or not settings:
        raise StrataViTError("bench: give at least one model and one setting")
    if any(is_super_network(model) for model in models.values()):
        raise StrataViTError("bench: a super-network has many sizes; extract those to time")
    size = (image_size[0], image_size[1], image_size[2])
    macs = {name: linear_macs(model, size, attention=True) for name, model in models.items()}
    first = next(iter(models))
    rows: list[Row] = []
    session_of = cache(lambda name, threads: latency.session_of(models[name], size, threads))
    for setting in track(settings, "time"):
        threads = setting.used_threads
        runs = [
            latency.runner(model, size, setting, session_of(name, threads) if setting.runtime == "onnx" else None)
            for name, model in models.items()
        ]
        timings = latency.in_turns(runs, setting, rounds, -(-latency.AT_LEAST_RUNS // rounds))
        for name, one in zip(models, timings, strict=True):
            speedup, ideal = timings[0].median_ms / one.median_ms, macs[first] / macs[name]
            dtype = str(setting.dtype_of(models[name])).removeprefix("torch.")
            ran = (name, setting.runtime, setting.batch_size, threads, dtype)
            rows.append(Row(*ran, one.median_ms, one.p90_ms, one.images_per_second, speedup, ideal, macs[name]))
    return rows


def tables(rows: Sequence[Row], device: str) -> list[Table]:
    """The rows as tables for the terminal, one for each setting."""
    views: dict[str, Table] = {}
    for row in rows:
        title = f"{row.runtime}, {row.dtype}, batch {row.batch_size}, {row.threads} threads, {device}"
        if title not in views:
            views[title] = Table(title=title)
            for heading in ("model", "MACs", "median ms", "p90 ms", "images/s", "speed-up", "MACs ratio"):
                views[title].add_column(heading, justify="left" if heading == "model" else "right")
        numbers = (f"{row.median_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.images_per_second:.1f}")
        views[title].add_row(row.model, human(row.macs), *numbers, f"{row.speedup:.2f}", f"{row.ideal:.2f}")
    return list(views.values())
