"""Other tools that prune a timm ViT, driven by their public interface. Imported by `quality.py`.

Torch-Pruning cuts whole channels of weights, tied by its dependency graph: `everywhere` cuts the token width, too;
`inside` ignores the layers that write tokens, so that head widths and MLPs alone are cut, the places that this library
cuts. `global` ranks all channels together, else every layer keeps the same ratio.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Batches
from timm.layers import Attention
from torch import nn

from stratavit.models.architecture import resolve_data_config
from stratavit.models.cost import linear_macs

NAMES = {"torch_pruning": "torch-pruning", "modelopt": "nvidia-modelopt"}  # package -> what installs it
STEPS = 7  # halvings of the ratio


@dataclass(frozen=True)
class Prune:
    """One setting of a tool.

    Attributes:
        package: What must be installed.
        importance: ``magnitude`` or ``taylor``.
        together: All channels in one ranking.
        inside: Head widths and MLPs only.
    """

    package: str
    importance: str
    together: bool
    inside: bool


PEERS = {
    f"Torch-Pruning {importance}, {'global' if together else 'uniform'}, {'inside' if inside else 'everywhere'}": Prune(
        "torch_pruning", importance, together, inside
    )
    for importance in ("magnitude", "taylor")
    for together, inside in ((True, False), (True, True), (False, True))
}


def installed(package: str) -> bool:
    """Whether a tool is here."""
    return importlib.util.find_spec(package) is not None


def versions() -> str:
    """Of the tools that are here."""
    found = [name for package, name in NAMES.items() if installed(package)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found) or "none"


def within(
    model: nn.Module, gradients: Mapping[str, torch.Tensor], share: float, prune: Prune
) -> tuple[nn.Module, float] | None:
    """The largest pruned model that keeps at most a share of the MACs, found by halving the tool's ratio.

    Args:
        model: Left as it is.
        gradients: See `gradients_of`.
        share: Of the linear MACs.
        prune: The setting.

    Returns:
        The model and the share that it keeps; None if even the largest ratio keeps more.
    """
    size = resolve_data_config(model)["input_size"]
    dense = linear_macs(model, size)
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        small = torch_pruned(copy.deepcopy(model), gradients, ratio, prune, size)
        kept = linear_macs(small, size) / dense
        if kept <= share:
            best, high = (small, kept), ratio
        else:
            low = ratio
    return best


def gradients_of(model: nn.Module, calibration: Batches) -> dict[str, torch.Tensor]:
    """Gradient of the summed loss of all images, by parameter."""
    model.zero_grad()
    for images, labels in calibration:
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def torch_pruned(
    model: Any, gradients: Mapping[str, torch.Tensor], ratio: float, prune: Prune, size: tuple[int, int, int]
) -> nn.Module:
    """A copy pruned by Torch-Pruning, as its own example for timm's ViTs does it."""
    import torch_pruning

    importance = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
    }[prune.importance]()
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for module in attentions:
        module.fused_attn = False  # its graph follows plain operations
    ignored: list[nn.Module] = [model.head]
    if prune.inside:
        ignored += [model.patch_embed.proj, *(block.attn.proj for block in model.blocks)]
        ignored += [block.mlp.fc2 for block in model.blocks]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.randn(1, *size),
        importance=importance,
        global_pruning=prune.together,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={module.qkv: module.num_heads for module in attentions},
        prune_num_heads=False,
        prune_head_dims=True,
        round_to=1,
    )
    names = dict(model.named_parameters())
    for name, value in gradients.items():
        names[name].grad = value.clone()
    pruner.step()
    model.zero_grad()
    for module in attentions:
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        module.attn_dim = module.num_heads * module.head_dim
    kept: nn.Module = model.eval()
    return kept
