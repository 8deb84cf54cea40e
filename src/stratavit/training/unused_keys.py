"""Keys of a recipe that have no effect in a run: reported, so that nobody takes them for the cause of its result."""

from __future__ import annotations

import sys

from stratavit.training.recipe import LIST_KEYS, PAPER, Kind, Recipe

SMALL = "small model"  # `TrainingTask.kind` of one


def idle_keys(recipe: Recipe, kind: str, classes: int) -> list[str]:
    """The keys that differ from their defaults and have no effect, for a `TrainingTask.kind` and a head's classes."""
    mode, small, raw = recipe.mode, kind == SMALL, recipe.keep == "raw"
    idle = {
        **dict.fromkeys(LIST_KEYS, small),
        **dict.fromkeys(("distil", "mixup", "cutmix", "smoothing"), not classes),
        "ema_decay": bool(recipe.ema_horizon) or raw,
        "ema_horizon": raw,
    }
    if not small:
        idle |= {"layer_drop": mode != "layerdrop", "list_epochs": mode != "piad"}
        idle |= {"sampling": mode in ("plain", "channel"), "growths": mode == "plain"}
    of_run: Kind = "finetune" if small else "train"
    usual = [Recipe.read(path, kind=of_run).to_dict() for path in (None, PAPER)]
    return [k for k, value in recipe.to_dict().items() if idle.get(k) and value not in [keys[k] for keys in usual]]


def report_unused(recipe: Recipe, kind: str, classes: int, processes: int) -> None:
    """Says on standard error which keys of a recipe have no effect in a run, or another one than they say."""
    found = idle_keys(recipe, kind, classes)
    if found:
        what = f"a {SMALL}" if kind == SMALL else f"mode {recipe.mode}"
        print(f"train: of no effect here ({what}): {', '.join(found)}", file=sys.stderr)
    rate = recipe.rate(recipe.batch_size * recipe.accumulate * processes)
    if rate < recipe.min_lr:
        low = f"the learning rate for batches of this size is {rate:.3g}, below min_lr ({recipe.min_lr:.3g})"
        print(f"train: {low}: it stays there throughout", file=sys.stderr)
