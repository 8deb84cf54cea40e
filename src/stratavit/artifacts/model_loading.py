"""Dense models by timm name, with weights from the hub or from a local file."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from torch import nn

from stratavit.artifacts import sub_network
from stratavit.artifacts.model_names import check_name, is_on_hub, timm_name
from stratavit.errors import StrataViTError
from stratavit.files.state_dicts import load_weights, unreachable
from stratavit.files.torch_checkpoint import read_checkpoint
from stratavit.interop import torchvision_vit
from stratavit.interop.timm_filter import fitted
from stratavit.interop.transformers import folders


def dense_model(name: str, weights: str | Path | None = None, num_classes: int | None = None) -> nn.Module:
    """A pre-trained timm model in eval mode, or timm's equivalent of one of torchvision.

    Args:
        name: timm's model name, with or without a pretrained tag, also as on the hub (``timm/NAME``,
            ``hf-hub:user/name``); or torchvision's, such as ``vit_b_16``.
        weights: Local checkpoint (``.safetensors``, or ``.pth`` read with ``weights_only=True``), fitted as timm
            does; the hub's pretrained weights if None.
        num_classes: Size of the head, if it is not the architecture's own.

    Returns:
        The model, on the CPU; maps images ``[B, C, H, W]`` to logits ``[B, classes]``.

    Raises:
        StrataViTError: Unknown name, or weights that cannot be fetched, read or fitted.
    """
    if name in torchvision_vit.NAMES:
        state = None if weights is None else read_checkpoint(Path(weights))
        return torchvision_vit.named(name, state, str(weights), num_classes)
    check_name(name)
    name = timm_name(name)
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    if weights is not None:
        with unreachable(name) if is_on_hub(name) else nullcontext():  # timm asks the hub for its architecture
            model: nn.Module = timm.create_model(name, **arguments)
        load_weights(model, fitted(name, model, read_checkpoint(Path(weights)), str(weights)), str(weights))
        return model.eval()
    with unreachable(name):
        model = timm.create_model(name, pretrained=True, **arguments)
    return model.eval()


def model_at(
    target: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A model by name, or from a folder that `stratavit.save` or transformers wrote; of transformers timm's equivalent.

    Args:
        target: Name or folder.
        weights, num_classes: See `dense_model`; for names only.
        device: To load to.

    Raises:
        StrataViTError: See `dense_model` and `stratavit.load`; options that a folder does not take.
    """
    if not Path(target).is_dir():
        return dense_model(target, weights, num_classes).to(device)
    if weights is not None or num_classes is not None:
        raise StrataViTError(
            f"{target} is a folder with weights and head of its own: leave out --weights, --num-classes"
        )
    if folders.is_folder_of_transformers(target):
        return folders.load_equivalent(target).to(device)
    return sub_network.load(target, device, timm_form=True)
