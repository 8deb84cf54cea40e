"""Keys of a recipe that have no effect in a run: reported, so that nobody takes them for the cause of its result."""

from __future__ import annotations

import sys

from stratavit.training.recipe import FINETUNING, LIST_KEYS, Recipe

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
    usual = Recipe.from_dict(FINETUNING if small else {}).to_dict()
    return [key for key, value in recipe.to_dict().items() if idle.get(key) and value != usual[key]]


def report_unused(recipe: Recipe, kind: str, classes: int, processes: int) -> None:
    """Says on standard error which keys of a recipe have no effect in a run, or another one than they say."""
    found = idle_keys(recipe, kind, classes)
    if found:
        what = f"a {SMALL}" if kind == SMALL else f"mode {recipe.mode}"
        print(f"train: of no effect here ({what}): {', '.join(found)}", file=sys.stderr)
    rate = recipe.lr * recipe.batch_size * recipe.accumulate * processes / 512
    if rate < recipe.min_lr:
        low = f"the learning rate for batches of this size is {rate:.3g}, below min_lr ({recipe.min_lr:.3g})"
        print(f"train: {low}: it stays there throughout", file=sys.stderr)
