"""The recipe of a training run: every number that changes its result, from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from stratavit.choices import ListAxes, Measure, Objective
from stratavit.errors import StrataViTError, described
from stratavit.training.values import Amount, Count, Probability, Rate, Share, Whole, check, check_type, read_toml

Mode = Literal["piad", "plain", "channel", "weighted", "layerdrop"]
Keep = Literal["ema", "raw"]
Learn = Literal["all", "bias+norm"]
Sampling = Literal["uniform", "sandwich", "budget"]
ListSource = Literal["auto", "progressive", "given"]
Compensation = Literal["auto", "mean", "full"]
Scaling = Literal["linear", "root"]
RateUnit = Literal["absolute", "relative"]
AugmentOn = Literal["workers", "device"]
Kind = Literal["train", "finetune", "recover"]  # of a run: what its function and its command are called
LISTED: tuple[Mode, ...] = ("piad", "weighted")  # modes of few sizes: prefixes of a list alone
PAPER = "paper"  # stands for the paper's recipe where a file may be given
Precision = Literal["auto", "no", "fp16", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """How a super-network is trained. The defaults are the paper's for DeiT-S and DeiT-Ti on ImageNet-1k.

    `read` and the commands start from other values, `TRAINING`, `FINETUNING` and `RECOVERY`, for few images, too.

    Sources: (P) the paper, arXiv 2511.11683; (D) the DeiT recipe, arXiv 2012.12877, which the paper follows;
    (S) StrataViT's own.

    Attributes:
        mode: ``piad`` (P), or an arm to compare it with, in our reading of the paper's ablation: ``plain``
            runs the full network only; ``channel`` keeps a uniformly drawn number of units at every site; ``weighted``
            draws from a list that is made once, before training, and keeps a unit of every site; ``layerdrop`` is
            ``weighted`` with sites skipped at random. ``plain`` and ``channel`` make their list at the end.
        layer_drop: Probability that ``layerdrop`` skips a site (S: 0.2, as LayerDrop, arXiv 1909.11556).
        compensation: What replaces cut channels while training, where the method is not the paper's: their
            ``mean``, or ``full``, what the kept ones predict (S). ``full`` starts from the one-shot networks, and keeps
            second moments. ``auto`` is ``full`` unless the method is the paper's.
        distil: Share of the target that is the teacher's output for the same batch, one forward pass more; without a
            teacher of its own the full network teaches smaller prefixes; 0 is none (P: none).
        distil_blocks: Weight of the relative error of every block's output against the teacher's, added to the loss
            (``tracing.block_error``); the teacher is that of `distil`, and has as many blocks of the same width (S: 0).
        learn: ``all`` weights, or ``bias+norm``: biases, norms and LayerScale alone (S).
        epochs: Passes over the training images; 150 for DeiT-B (P).
        batch_size: Images per process and pass; times `accumulate` times processes it is the global batch (D: 1,024).
            0: a tenth of the images, 8 to 128 (S).
        accumulate: Batches whose gradients are added up for one step, each with its own draw (S).
        lr: Largest learning rate at a global batch of 512 images (D).
        lr_scaling: How the rate follows the global batch: ``linear`` (D), or ``root``, as the square root, which suits
            AdamW at small batches (S; arXiv 2205.10287).
        lr_unit: ``absolute``, or ``relative``: the rate is a share of the root mean square that each tensor of weights
            has at the start, which suits models whatever the size of their weights (S; Adafactor, arXiv 1804.04235).
        bias_norm_lr_scale: Rate of biases, norms and LayerScale, a multiple of that of all other weights (S).
        min_lr: Learning rate at the end of the cosine (D).
        warmup_epochs: Epochs of linear warm-up from `min_lr` (P: none).
        weight_decay: Of AdamW; norms, biases and tokens are spared, as timm does (D).
        clip: Largest gradient norm; 0 is no clipping (D: none).
        drop_path: Rate at the last block, rising linearly from 0 (D).
        mixup, cutmix: Alphas of the Beta distributions, 0 is off (D).
        smoothing: Label smoothing (D).
        randaugment: timm's name of the policy for image folders; empty is none (D).
        crop: Smallest share of an image that a random crop keeps, image folders only (D: 0.08).
        flip: Probability of a horizontal flip, image folders only (D: 0.5).
        erasing: Probability of random erasing, image folders only (D).
        repeats: Repeated augmentation, copies of an image per epoch (D).
        ema_decay: Of the averaged weights, 0 is none (D: 0.99996).
        ema_horizon: If above 0, in place of `ema_decay`: the average reaches back over this share of all steps. For
            short runs, which 0.99996 would leave near their start (S).
        keep: Which weights are evaluated and saved: ``ema``, or ``raw`` (S).
        reduction: r, share of the dense MACs that the finished list drops (P).
        list_source: ``progressive`` measures what to append whenever the list grows (P); ``given`` follows the
            list that the network came with, and measures only what that list lacks (S). ``auto`` is ``given`` where
            there is such a list, unless the method is the paper's.
        axes: ``width``, or ``both``: prefixes of the list over widths and tokens are drawn, which the network must have
            come with; both of its lists stay as they are (S).
        list_epochs: P_e, epochs in which the list grows (P); 0 is half of `epochs` (S).
        growths: Times per epoch that the list grows and means are measured (P: 1); more for runs of few epochs. 0 is 2,
            or 1 where an epoch has one step (S).
        head_dim_unit: Coordinates of the head width that are dropped together (P).
        mlp_units: Groups that the MLP hidden width is dropped in (P).
        objective: What Taylor importance differentiates, see `statistics.collect`; ``auto``: the true logit (P).
        measure: Of sensitivity, see `sensitivity.bypass_sensitivity`; ``auto`` is top-1 (P) except near chance.
        sampling: See `sampling.draw`; ``uniform`` (P).
        proxy_images: Images that importance and means are measured on (P: 1,024).
        compile_sizes: Sizes whose passes are compiled (`torch.compile`), the full one among them: what is drawn is
            rounded to the nearest of so many, evenly spaced in MACs. 0 compiles nothing and rounds nothing (S).
        precision: ``no``, ``fp16``, ``bf16``, or ``auto``, the setting of `accelerate launch` (S).
        seed: Of order, augmentation, draws and drop-path (S).
        augment_on: Where images are cropped, flipped and erased: ``workers``, or ``device``, a batch at once, for which
            workers only decode (S).
        workers: Image-loading processes per training process (S).
        eval_every: Epochs between evaluations of the ladder of budgets; the last epoch is always evaluated (S).
        save_every: Epochs between saved states (S).
        save_steps: Also save after so many steps; 0 is never (S).
        log_steps: Steps between looks at the loss; a loss that is not finite is found then (S).
        tracker: ``tensorboard``, another of Accelerate's, or ``none`` (S).
    """

    mode: Mode = "piad"
    layer_drop: Rate = 0.2
    compensation: Compensation = "mean"
    distil: Probability = 0.0
    distil_blocks: Amount = 0.0
    learn: Learn = "all"
    epochs: Count = 300
    batch_size: Whole = 128
    accumulate: Count = 1
    lr: Amount = 5e-4
    lr_scaling: Scaling = "linear"
    lr_unit: RateUnit = "absolute"
    bias_norm_lr_scale: Amount = 1.0
    min_lr: Amount = 1e-5
    warmup_epochs: Whole = 0
    weight_decay: Amount = 0.05
    clip: Amount = 0.0
    drop_path: Rate = 0.1
    mixup: Amount = 0.8
    cutmix: Amount = 1.0
    smoothing: Rate = 0.1
    randaugment: str = "rand-m9-mstd0.5-inc1"
    crop: Share = 0.08
    flip: Probability = 0.5
    erasing: Rate = 0.25
    repeats: Count = 3
    ema_decay: Rate = 0.99996
    ema_horizon: Amount = 0.0
    keep: Keep = "ema"
    reduction: Share = 0.875
    list_source: ListSource = "progressive"
    axes: ListAxes = "width"
    list_epochs: Whole = 50
    growths: Whole = 1
    head_dim_unit: Count = 8
    mlp_units: Count = 32
    objective: Objective = "auto"
    measure: Measure = "auto"
    sampling: Sampling = "uniform"
    proxy_images: Count = 1024
    compile_sizes: Whole = 0
    precision: Precision = "auto"
    seed: Whole = 0
    augment_on: AugmentOn = "workers"
    workers: Whole = 4
    eval_every: Count = 10
    save_every: Count = 1
    save_steps: Whole = 0
    log_steps: Count = 50
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            check_type(name, getattr(self, name), kind)
            if kind is float:
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, kind in get_type_hints(Recipe, include_extras=True).items():
            for words, sound in getattr(kind, "__metadata__", ()):
                check(sound(getattr(self, name)), f"{name} must be {words}, got {getattr(self, name)}")
        check(
            self.mode != "piad" or self.list_epochs <= self.epochs,
            f"list_epochs ({self.list_epochs}) must not exceed epochs ({self.epochs}), or the list stays unfinished",
        )
        check(
            not self.compile_sizes or self.mode == "plain" or (self.mode in LISTED and self.compile_sizes > 1),
            f"compile_sizes must be 0, or at least 2 in a mode that draws from a list ({', '.join(LISTED)}), got "
            f"{self.compile_sizes} in mode {self.mode}",
        )
        check(
            self.augment_on == "workers" or not self.randaugment,
            "randaugment cannot be done on the device; make it empty, or set augment_on to 'workers'",
        )
        check(self.warmup_epochs < self.epochs, "warmup_epochs must be below epochs")
        check(
            not (self.mixup or self.cutmix) or self.batch_size % 2 == 0,
            f"batch_size must be even for mixup and cutmix, got {self.batch_size}",
        )

    def resumed(self, asked: Recipe, source: str) -> Recipe:
        """The recipe of a run that was begun with this one and goes on with another.

        Raises:
            StrataViTError: They differ in something that has an effect on the weights; `source` is named.
        """
        size, growths = asked.batch_size or self.batch_size, asked.growths or self.growths
        asked = dataclasses.replace(asked, batch_size=size, growths=growths)
        for key, value in asked.to_dict().items():
            if key not in _WITHOUT_EFFECT and value != getattr(self, key):
                raise StrataViTError(
                    f"{source} was trained with {key} = {described(getattr(self, key))}; a resumed run "
                    f"cannot make it {described(value)}"
                )
        return asked

    def sized(self, images: int, processes: int = 1) -> Recipe:
        """The recipe for so many images: a batch size of 0 becomes one that gives several steps per epoch."""
        most = images // (processes * self.accumulate)
        size = min(max(most // 10, 8), 128, most)
        size = self.batch_size or max(size - size % 2, 1)  # mixup pairs images
        return dataclasses.replace(self, batch_size=size, growths=self.growths or max(min(2, most // size), 1))

    def rate(self, images: int) -> float:
        """Largest learning rate for a global batch of so many images."""
        return self.lr * (images / 512) ** (1.0 if self.lr_scaling == "linear" else 0.5)

    @property
    def stages(self) -> int:
        """Stages in which the list grows, in mode ``piad``."""
        return (self.list_epochs or (self.epochs + 1) // 2) * self.growths

    def decay(self, steps: int) -> float:
        """EMA decay per step for a run of so many steps; 0 is no average."""
        if not self.ema_horizon:
            return self.ema_decay
        return max(1 - 1 / (self.ema_horizon * steps), 0.0)

    def due(self, epoch: int, every: int) -> bool:
        """Whether something is done after so many epochs: every few of them, and after the last."""
        return epoch == self.epochs or epoch % every == 0

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """A recipe from some of its keys.

        Raises:
            StrataViTError: An unknown key, a wrong type or a value out of range; `source` is named.
        """
        known = field_types()
        try:
            for name in values:
                check(name in known, f"unknown key {described(name)}; the keys are {', '.join(known)}")
            return cls(**values)
        except StrataViTError as error:
            raise StrataViTError(f"{source}: {error}") from error

    @classmethod
    def read(
        cls,
        path: str | Path | None,
        overrides: Mapping[str, Any] | None = None,
        kind: Kind | None = None,
        begun: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """A recipe from a TOML file, over which `overrides` win.

        Args:
            path: The file; ``paper`` for the paper's recipe; None for none.
            overrides: Keys that win over those of the file.
            kind: Keys that are not given are as in `TRAINING`, `FINETUNING` or `RECOVERY`; None, or a file with
                ``base = "paper"``: as in the paper.
            begun: Keys of the interrupted run that goes on, in place of these.

        Raises:
            StrataViTError: The file cannot be read, or see `from_dict`.
        """
        values = {} if path in (None, PAPER) else read_toml(Path(str(path)))
        source = "recipe" if path is None else str(path)
        named = PAPER if path == PAPER else values.pop("base", None)
        check(named in (None, PAPER), f"{source}: base must be {PAPER!r} or left out, got {described(named)}")
        check(named is None or kind != "recover", f"{source}: the paper has no recipe of recovery; leave out {PAPER}")
        base = {} if kind is None else (PAPERS if named == PAPER else DEFAULTS)[kind]
        return cls.from_dict({**(begun or base), **values, **(overrides or {})}, source)


PAPERS: dict[Kind, dict[str, Any]] = {
    "train": {},
    "finetune": {"mode": "plain", "epochs": 30, "lr": 5e-5, "min_lr": 1e-6},  # keys of the dropout list have no effect
}
_FEW_STEPS: dict[str, Any] = {  # what a run of few steps on few images needs, other than the DeiT recipe (S)
    **{"batch_size": 0, "lr_scaling": "root", "min_lr": 1e-6, "repeats": 1, "crop": 0.6, "smoothing": 0.1},
    **{"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "randaugment": "", "erasing": 0.0},
}
TRAINING: dict[str, Any] = {  # the best measured, see docs/training.md (S)
    **_FEW_STEPS,
    **{"compensation": "auto", "list_source": "auto", "sampling": "sandwich"},
    **{"epochs": 10, "list_epochs": 0, "growths": 0, "lr": 2.5e-4, "ema_horizon": 0.05},
}
FINETUNING: dict[str, Any] = {**_FEW_STEPS, "mode": "plain", "epochs": 30, "lr": 5e-4, "ema_horizon": 0.1}
RECOVERY: dict[str, Any] = {  # an epoch is what lies between two looks at the agreement with the teacher (S)
    **_FEW_STEPS,
    **{"mode": "plain", "distil": 1.0, "distil_blocks": 1.0, "epochs": 20, "warmup_epochs": 2, "batch_size": 32},
    **{"lr": 4.5e-3, "lr_unit": "relative", "bias_norm_lr_scale": 5.0, "crop": 0.5, "smoothing": 0.0},
    **{"ema_decay": 0.0, "keep": "raw"},
    **{"reduction": 2 / 3, "sampling": "sandwich", "workers": 0, "tracker": "none"},
}
RECOVERY_IMAGES, RECOVERY_STEPS = 4096, 80  # most images that are held, and steps, unless others are asked for
DEFAULTS: dict[Kind, dict[str, Any]] = {"train": TRAINING, "finetune": FINETUNING, "recover": RECOVERY}
LIST_KEYS = (
    *("mode", "layer_drop", "compensation", "reduction", "list_epochs", "growths", "head_dim_unit", "mlp_units"),
    *("objective", "measure", "sampling", "proxy_images", "list_source", "axes"),
)
NOT_OF_RECOVERY = (
    *(key for key in LIST_KEYS if key not in ("reduction", "sampling")),
    *("distil", "drop_path", "smoothing", "randaugment", "erasing", "eval_every", "augment_on"),
)
_WITHOUT_EFFECT = ("workers", "eval_every", "save_every", "save_steps", "log_steps", "tracker")


def field_types() -> dict[str, Any]:
    """Key -> type of every key: ``int``, ``float``, ``str`` or a ``Literal``."""
    return get_type_hints(Recipe)
