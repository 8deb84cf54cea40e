"""Keys of a recipe that have no effect in a run: reported, so that nobody takes them for the cause of its result."""

from __future__ import annotations

import sys

from stratavit.training.recipe import DEFAULTS, LIST_KEYS, NOT_OF_RECOVERY, PAPERS, Kind, Recipe

SMALL, RECOVERED = "small model", "recovery"  # values of `TrainingTask.kind`
_RUNS: dict[str, Kind] = {SMALL: "finetune", RECOVERED: "recover"}


def idle_keys(recipe: Recipe, kind: str, classes: int) -> list[str]:
    """The keys that differ from their defaults and have no effect, for a `TrainingTask.kind` and a head's classes."""
    mode, small, raw, recovered = recipe.mode, kind == SMALL, recipe.keep == "raw", kind == RECOVERED
    idle = {
        **dict.fromkeys(LIST_KEYS, small),
        **dict.fromkeys(("distil", "mixup", "cutmix", "smoothing"), not (classes or recovered)),
        **dict.fromkeys(NOT_OF_RECOVERY if recovered else (), True),
        "ema_decay": bool(recipe.ema_horizon) or raw,
        "ema_horizon": raw,
    }
    if kind not in _RUNS:
        idle |= {"layer_drop": mode != "layerdrop", "list_epochs": mode != "piad"}
        idle |= {"sampling": mode in ("plain", "channel"), "growths": mode == "plain"}
    run = _RUNS.get(kind, "train")
    usual = [Recipe(**recipes[run]).to_dict() for recipes in (DEFAULTS, PAPERS) if run in recipes]
    return [k for k, value in recipe.to_dict().items() if idle.get(k) and value not in [keys[k] for keys in usual]]


def report_unused(recipe: Recipe, kind: str, classes: int, processes: int) -> None:
    """Says on standard error which keys of a recipe have no effect in a run, or another one than they say."""
    found = idle_keys(recipe, kind, classes)
    if found:
        what = {SMALL: f"a {SMALL}", RECOVERED: RECOVERED}.get(kind, f"mode {recipe.mode}")
        print(f"train: of no effect here ({what}): {', '.join(found)}", file=sys.stderr)
    rate = recipe.rate(recipe.batch_size * recipe.accumulate * processes)
    if rate < recipe.min_lr:
        low = f"the learning rate for batches of this size is {rate:.3g}, below min_lr ({recipe.min_lr:.3g})"
        print(f"train: {low}: it stays there throughout", file=sys.stderr)
