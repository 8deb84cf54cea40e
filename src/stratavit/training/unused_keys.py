"""Keys of a recipe that a run has no use for: told, so that nobody takes them for the cause of its result."""

from __future__ import annotations

import sys

from stratavit.training.recipe import FINETUNING, LIST_KEYS, Recipe

SMALL = "small model"  # `TrainingTask.kind` of one
_OF_LABELS = ("distil", "mixup", "cutmix", "smoothing")


def idle_keys(recipe: Recipe, kind: str, classes: int) -> list[str]:
    """The keys that differ from their defaults and have no effect.

    Args:
        recipe: Of the run.
        kind: See `TrainingTask`.
        classes: Of the head; 0 where features are learnt.
    """
    mode = recipe.mode
    idle = set() if classes else set(_OF_LABELS)
    if kind == SMALL:
        idle |= set(LIST_KEYS)
    else:
        idle |= {"layer_drop"} if mode != "layerdrop" else set()
        idle |= {"list_epochs"} if mode != "piad" else set()
        idle |= {"sampling"} if mode in ("plain", "channel") else set()
        idle |= {"growths"} if mode == "plain" else set()
    if recipe.ema_horizon or recipe.keep == "raw":
        idle |= {"ema_decay"}
    if recipe.keep == "raw":
        idle |= {"ema_horizon"}
    usual = Recipe.from_dict(FINETUNING if kind == SMALL else {}).to_dict()
    return [key for key, value in recipe.to_dict().items() if key in idle and value != usual[key]]


def tell(recipe: Recipe, kind: str, classes: int, processes: int) -> None:
    """Says on standard error which keys of a recipe have no effect in a run, or not the one they say."""
    found = idle_keys(recipe, kind, classes)
    if found:
        what = f"a {SMALL}" if kind == SMALL else f"mode {recipe.mode}"
        print(f"train: of no effect here ({what}): {', '.join(found)}", file=sys.stderr)
    rate = recipe.lr * recipe.batch_size * recipe.accumulate * processes / 512
    if rate < recipe.min_lr:
        print(
            f"train: the learning rate for batches of this size is {rate:.3g}, below min_lr ({recipe.min_lr:.3g}): "
            "it stays there throughout",
            file=sys.stderr,
        )
