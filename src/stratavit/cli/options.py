"""What several commands read from their options."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

from stratavit.data.image_folder import ImageLoader, image_loader
from stratavit.evaluation.latency import Runtime, Setting

Outcome = tuple[dict[str, Any], list[Any]]


def default_workers() -> int:
    """Image-loading processes: one per core, four at most."""
    return min(4, os.cpu_count() or 1)


def loader_of(
    args: Namespace,
    data_config: dict[str, Any],
    split: str,
    classes: int,
    limit: int | None = None,
    names: Sequence[str] | None = None,
) -> ImageLoader:
    """Images of ``--data`` as the command line says, checked against so many classes (0: any) of these names."""
    options = (args.class_map, args.batch_size, max(args.workers, 0), limit, names)
    return image_loader(args.data, data_config, split, classes, *options)


def budgets(args: Namespace) -> Any:
    """The budgets that the command line takes, and how latency is timed."""
    kinds = ("macs", "params", "memory_mb", "latency_ms", "position", "top1", "max_drop")
    batch, runtime = getattr(args, "latency_batch", 1), getattr(args, "runtime", "eager")
    setting = Setting(batch_size=batch, runtime=cast(Runtime, runtime), dtype=args.dtype, threads=args.threads)
    return {kind: getattr(args, kind, None) for kind in kinds} | {"setting": setting}


def budgeted(asked: Any) -> bool:
    """Whether the command line gave a budget."""
    return any(value is not None for kind, value in asked.items() if kind != "setting")
