"""NVIDIA ModelOpt's FastNAS on a timm ViT, driven by its public interface. Imported by `quality.py`.

Of a ViT it offers the hidden widths of the MLPs and nothing else. Every width of every MLP is scored alone, on labelled
images; a size is then the widths whose damage stays below one threshold, the same for all. ModelOpt keeps the scores in
a checkpoint of its own, so that only the first size pays for them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Batches
from torch import nn

from stratavit.models.architecture import resolve_data_config
from stratavit.models.cost import linear_macs

PACKAGE = "modelopt"
TITLES = {f"ModelOpt FastNAS (MLP widths), scored by {name}": name for name in ("top-1", "loss")}
IMAGES = 100  # that each width is scored on
RATIOS = tuple(n / 5 for n in range(1, 6))  # of each hidden width; by default it tries 20 of them


@dataclass
class FastNAS:
    """One search, for all sizes.

    Attributes:
        model: Left as it is.
        score: ``top-1`` or ``loss``.
        calibration: Labelled images; about `IMAGES` of them, evenly spread, are scored on.
    """

    model: nn.Module
    score: str
    calibration: Batches
    _folder: Any = field(default_factory=tempfile.TemporaryDirectory)

    @cached_property
    def _scored(self) -> Batches:
        every = max(1, sum(len(labels) for _, labels in self.calibration) // IMAGES)
        chosen = [(images[::every], labels[::every]) for images, labels in self.calibration]
        images, labels = (torch.cat(side) for side in zip(*chosen, strict=True))
        return list(zip(images.split(50), labels.split(50), strict=True))

    def within(self, share: float) -> tuple[nn.Module, float] | None:
        """What the search finds for a share of the linear MACs, and the share that it keeps; None if out of reach.

        ModelOpt counts more than linear maps, all of it outside the MLPs' widths: what it may keep is its own count of
        the dense model less the linear MACs that must go.
        """
        import modelopt.torch.prune as mtp
        from modelopt.torch.nas.utils import inference_flops

        size = resolve_data_config(self.model)["input_size"]
        dense, blank = linear_macs(self.model, size), torch.zeros(1, *size)
        config = {
            "data_loader": self._scored,
            "score_func": self._rate,
            "checkpoint": str(Path(self._folder.name) / "scores.pth"),
            "verbose": False,
        }
        space = {"nn.Linear": {"*": {"features_ratio": RATIOS, "feature_divisor": 32}}}
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            flops = inference_flops(copy.deepcopy(self.model), blank, unit=1.0) - 2 * (1 - share) * dense
            try:
                small, _ = mtp.prune(
                    copy.deepcopy(self.model), [("fastnas", space)], {"flops": flops}, blank, config=config
                )
            except ValueError as error:
                if "NOT all constraints can be satisfied" not in str(error):
                    raise
                return None
        kept = linear_macs(small, size) / dense
        if kept > share:
            raise RuntimeError(f"ModelOpt kept {kept:.4f} of the linear MACs, asked for at most {share:.4f}")
        return small.eval(), kept

    @torch.inference_mode()
    def _rate(self, model: nn.Module) -> float:
        """Top-1 in percent, or the mean log-likelihood of the labels."""
        total = 0.0
        for images, labels in self._scored:
            logits = model(images)
            right = 100 * (logits.argmax(dim=-1) == labels).float()
            values = right if self.score == "top-1" else -F.cross_entropy(logits, labels, reduction="none")
            total += float(values.sum())
        return total / sum(len(labels) for _, labels in self._scored)
