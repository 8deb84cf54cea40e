"""An external teacher: a frozen model whose answers become part of the targets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from stratavit.errors import StrataViTError
from stratavit.utils.model import classes_of, model_dtype


class Teacher:
    """Answers images that were prepared for a student.

    Args:
        model: Any model from images to logits; it is not copied, and put into eval mode.
        name: Told when a resumed run has another teacher.
        size: Height and width that it expects; None: as the student.
        own, theirs: Mean and std that the teacher's and the student's images are normalised by.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        size: tuple[int, int] | None,
        own: tuple[Tensor, Tensor],
        theirs: tuple[Tensor, Tensor],
    ) -> None:
        self.model, self.name, self.size = model.eval(), name, size
        (mean, std), (mean_s, std_s) = own, theirs
        self.factor, self.shift = std_s / std, (mean_s - mean) / std  # [C, 1, 1]

    @classmethod
    def of(cls, model: nn.Module, student: Mapping[str, Any]) -> Teacher:
        """A teacher whose own normalisation and input size are read off a timm model, else taken to be the student's.

        Args:
            model: The teacher.
            student: The student's data configuration.
        """
        own = getattr(model, "data_config", None)
        if own is None:
            own = resolve_model_data_config(model) if getattr(model, "pretrained_cfg", None) else student
        fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = tuple(own["input_size"][1:] if fixed is None else fixed)
        same = size == tuple(student["input_size"][1:])
        cfg = getattr(model, "pretrained_cfg", None) or {}
        name = f"{cfg.get('architecture') or type(model).__name__} {_digest(model)}"
        return cls(model, name, None if same else (size[0], size[1]), _normal(own), _normal(student))

    def to(self, device: torch.device, classes: int) -> Teacher:
        """Moved to a device, and checked against the number of classes.

        Raises:
            StrataViTError: The teacher has another number of classes.
        """
        own = classes_of(self.model) if hasattr(self.model, "num_classes") else classes
        if own != classes:
            raise StrataViTError(
                f"teacher: it has {own} classes, the student {classes}; give one that was trained for the same classes"
            )
        self.model.to(device)
        self.factor, self.shift = self.factor.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` for images ``[B, C, H, W]`` in the student's normalisation."""
        images = (images * self.factor + self.shift).to(model_dtype(self.model))
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits: Tensor = self.model(images)
        return logits


def _digest(model: nn.Module) -> str:
    """Eight digits that tell one set of weights from another."""
    digest = hashlib.blake2b(digest_size=4)
    for name, tensor in model.state_dict().items():
        numbers = tensor.detach().cpu().reshape(-1)  # a count of batches has no dimension
        digest.update(name.encode() + numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _normal(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(config[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    return mean, std
