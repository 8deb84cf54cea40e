"""An external teacher: a frozen model whose outputs become part of the targets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from stratavit.errors import StrataViTError
from stratavit.utils.model import classes_of, model_dtype


class Teacher:
    """Logits for images that were prepared for a student.

    The teacher's own normalisation and input size are read off a timm model; of others they are the student's. The
    model is not copied, and put into eval mode.

    Attributes:
        run: What maps prepared images to outputs: the model, or what also says what its blocks did (`tracing.trace`).
        name: Reported when a resumed run has another teacher.
        input_size: Channels, height and width of the student's images.
        size: Height and width that they are resized to; None: they stay as they are.
    """

    def __init__(self, model: nn.Module, student: Mapping[str, Any]) -> None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        own = getattr(model, "data_config", None) or (resolve_model_data_config(model) if cfg else student)
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or own["input_size"][1:]
        self.model = model.eval()
        self.run: Callable[[Tensor], Any] = self.model
        self.name = f"{cfg.get('architecture') or type(model).__name__} {_digest(model)}"
        self.input_size = tuple(student["input_size"])
        self.size = None if (height, width) == tuple(student["input_size"][1:]) else (height, width)
        (mean, std), (mean_s, std_s) = _normal(own), _normal(student)
        self.factor, self.shift = std_s / std, (mean_s - mean) / std  # [C, 1, 1]

    def to(self, device: torch.device, classes: int) -> Teacher:
        """Moved to a device; one with another number of classes than the student is refused."""
        own = classes_of(self.model) if hasattr(self.model, "num_classes") else classes
        if own != classes:
            raise StrataViTError(
                f"teacher: it has {own} classes, the student {classes}; give one that was trained for the same classes"
            )
        self.model.to(device)
        self.factor, self.shift = self.factor.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """Logits ``[B, classes]`` (what `run` gives) for images ``[B, C, H, W]`` in the student's normalisation."""
        images = images * self.factor + self.shift
        if self.size is not None:  # in the images' precision: torch cannot resize bfloat16 on the CPU
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.run(images.to(model_dtype(self.model)))


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
