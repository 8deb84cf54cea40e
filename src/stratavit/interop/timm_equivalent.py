"""timm's equivalent of another library's model, and whether their outputs are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.files.state_dicts import load_weights
from stratavit.models.freezing import set_frozen
from stratavit.utils.model import eval_mode, model_device, model_dtype

TOLERANCE = 1e-3  # of the largest output, in float32; what is rounded more coarsely differs more
COARSE = 0.1


def fill_equivalent(
    made: Any, source: nn.Module, state: Mapping[str, Tensor], frozen: Iterable[str], data_config: Mapping[str, Any]
) -> Any:
    """Makes a fresh timm model the equivalent of another library's: in eval mode, of its type, on its device.

    Args:
        state, frozen: The weights under timm's names, and the names of those that ask for no gradient.
        data_config: How images are prepared.
    """
    load_weights(made, state, type(source).__name__)
    set_frozen(made, frozen)
    made.to(dtype=model_dtype(source), device=model_device(source)).eval()
    made.data_config = dict(data_config)
    check_equivalent(made, source, data_config["input_size"])
    return made


def check_equivalent(made: nn.Module, source: nn.Module, image_size: tuple[int, int, int]) -> None:
    """Compares two models on a random image, at the size that the source was built for.

    Raises:
        UnsupportedModelError: Their outputs differ by more than rounding.
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
            f"cannot cut this {type(source).__name__}: the outputs of timm's model of the same form differ by "
            f"{difference:.1e} of the largest value; something in its configuration or modules has no counterpart there"
        )


def tensor_of(output: Any) -> Tensor:
    """The logits or features in a model's output, be it a tensor or an output of transformers."""
    if isinstance(output, Tensor):
        return output
    logits: Tensor | None = getattr(output, "logits", None)
    return output.pooler_output if logits is None else logits
