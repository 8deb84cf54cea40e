"""A part of a larger model, run as that model runs it: images to all maps that the part hands on, in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratavit.data.pixels import keys_of
from stratavit.models.families.base import Family, Stages


class HostedPart(nn.Module):
    """A part of a host, with the arguments that the host gives it.

    Args:
        name: Attribute that holds the part: the first name of its sites.
        part: The module.
        arguments: Of its `forward`, besides the images: the same for all of them.
        by_image: Key of an image (`pixels.keys_of`) -> arguments that are its own, without the dimension of images.
        images: Name of the argument that the images are.
        unsqueezed: It has no channels: patches ``[B, N, values]``, kept as ``[B, 1, N, values]``.
        outputs: Numbers of the tensors of its output that the host reads.
        packed: Patches of all images come in one sequence ``[B*N, values]``, and so do what it returns for them.

    Attributes:
        scales: Of each of these, so that a map of average energy has length 1.
    """

    embedding, num_classes = True, 0  # for `utils.model.classes_of`: the output is a feature

    def __init__(
        self,
        name: str,
        part: nn.Module,
        images: str,
        unsqueezed: bool,
        arguments: Mapping[str, Any],
        by_image: Mapping[bytes, Mapping[str, Tensor]],
        outputs: Sequence[int],
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.images, self.unsqueezed, self.packed = name, images, unsqueezed, packed
        self.arguments, self.by_image = dict(arguments), dict(by_image)
        self.outputs, self.scales = tuple(outputs), [1.0] * len(outputs)
        self.add_module(name, part)

    @property
    def part(self) -> nn.Module:
        """The module itself."""
        return self.get_submodule(self.name)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images to what the host reads, each ``[B, ...]``; zeros for tokens that are padding."""
        given = self.arguments_for(images)
        leaves = tree_leaves(self.part(**given))
        found = [leaves[number] for number in self.outputs]
        for name, mask in given.items():
            if name.endswith("attention_mask") and isinstance(mask, Tensor) and mask.dim() == 2:
                found = [one * mask.unsqueeze(-1) if one.shape[:-1] == mask.shape else one for one in found]
        return [one.unflatten(0, (len(images), -1)) for one in found] if self.packed else found

    def arguments_for(self, images: Tensor) -> dict[str, Any]:
        """All arguments of the part for images."""
        given = images.squeeze(1) if self.unsqueezed else images
        found = {**self.arguments, self.images: given.flatten(0, 1) if self.packed else given}
        if self.by_image:
            rows = [self.by_image[key] for key in keys_of(images)]
            for name in rows[0]:
                stacked = torch.stack([row[name] for row in rows]).to(images.device)
                found[name] = stacked.to(images.dtype) if stacked.is_floating_point() else stacked
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Images to all maps, one after the other and scaled alike, ``[B, values]``."""
        found = [scale * one.flatten(1) for one, scale in zip(self.maps(images), self.scales, strict=True)]
        return torch.cat([one.to(found[0].device) for one in found], dim=1)


class Hosted(Family):
    """Any model of which attention and MLP modules are elastic; its forward pass is not taken apart."""

    title = "part of a host"
    model = HostedPart
    fallback = ""

    def check(self, model: Any) -> None:
        """Nothing: what can be cut of it was found module by module."""

    def stages(self, model: HostedPart) -> Stages:
        """All of the forward pass is one step, and its output the tail."""
        return Stages(
            stem=lambda images: images.detach().clone(),  # a gradient is asked for
            blocks=((model.name, model),),
            tail=lambda maps: maps,
            pool=lambda maps: maps.mean(dim=1, keepdim=True),
        )

    def last_norm(self, model: Any) -> None:
        """None: the maps of several depths have no norm in common."""

    def layer_scale(self, model: Any, site: str) -> Tensor | None:
        """The factors that the block has for attention (1) or the MLP (2), under the names of timm and transformers."""
        number = 1 if getattr(model.get_submodule(site), "attention", False) else 2
        block = model.get_submodule(site.rpartition(".")[0])
        for name in (f"layer_scale{number}", f"ls{number}", f"gamma_{number}", f"lambda_{number}"):
            found: Any = getattr(block, name, None)
            if isinstance(found, nn.Module):
                found = next(found.parameters(), None)
            if isinstance(found, Tensor) and found.dim() == 1:
                return found
        return None
