"""Models in half precision: cast, and compared with what they were before they are trusted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import StrataViTError, one_line
from stratavit.models.architecture import resolve_data_config
from stratavit.utils.model import eval_mode, model_device, model_dtype

HALF_TOLERANCE = 0.05  # of the largest output; bfloat16 has 8 bits, and a network has many layers
IMAGES = 4


class InHalf(nn.Module):
    """A model in float16 that takes and gives float32.

    Args:
        model: In float32; it is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model).half()
        self.data_config, self.num_classes = resolve_data_config(model), getattr(model, "num_classes", 0)
        self.pretrained_cfg, self.origin = getattr(model, "pretrained_cfg", None), getattr(model, "origin", None)
        self.embedding = getattr(model, "embedding", False)
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        logits: Tensor = self.model(images.half())
        return logits.float()


@torch.no_grad()
def in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another floating-point type, if it still computes nearly the same on random images.

    Args:
        model: A timm model; it is copied, unless it has the type already.
        dtype: Of its weights.

    Returns:
        The model in the type.

    Raises:
        StrataViTError: Outputs differ by more than `HALF_TOLERANCE` of the largest, or overflow.
    """
    if model_dtype(model) is dtype:
        return model
    made: Any = copy.deepcopy(model).to(dtype)
    size = resolve_data_config(model)["input_size"]
    images = torch.randn(IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(model_device(model))
    name = str(dtype).removeprefix("torch.")
    with eval_mode(model), eval_mode(made):
        expected = model(images.to(model_dtype(model))).float()
        try:
            found = made(images.to(dtype)).float()
        except RuntimeError as error:
            raise StrataViTError(f"dtype: the model cannot be run in {name} here ({one_line(error)})") from error
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not off <= HALF_TOLERANCE:  # NaN does not pass either
        raise StrataViTError(
            f"dtype: in {name} the outputs differ by {off:.1e} of the largest, more than {HALF_TOLERANCE}; "
            "take bfloat16, whose range is wider, or float32"
        )
    converted: nn.Module = made
    return converted
