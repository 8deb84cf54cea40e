"""Does timm's equivalent of another library's model answer as that does?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.utils.model import eval_mode, model_device, model_dtype

TOLERANCE = 1e-3  # of the largest answer, in float32; what is rounded more coarsely differs more
COARSE = 0.1


def check_equivalent(made: nn.Module, source: nn.Module, image_size: tuple[int, int, int]) -> None:
    """Compares two models on a random image, at the size that the source was built for.

    Raises:
        UnsupportedModelError: They differ by more than rounding does.
    """
    device, dtype = model_device(made), model_dtype(made)
    if device.type == "meta":
        return
    image = torch.randn(1, *image_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad(), eval_mode(source):
        ours, theirs = made(image).float(), tensor_of(source(image)).float()
    allowed = TOLERANCE if dtype in (torch.float32, torch.float64) else COARSE
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"cannot cut this {type(source).__name__}: timm's model of the same form answers otherwise, by "
            f"{difference:.1e} of the largest value; something in its configuration or modules has no counterpart there"
        )


def tensor_of(answer: Any) -> Tensor:
    """The logits or features of a model's answer, be it a tensor or an output of transformers."""
    if isinstance(answer, Tensor):
        return answer
    logits = getattr(answer, "logits", None)
    found: Tensor = answer.pooler_output if logits is None else logits
    return found
