"""MLPs that run any number of their hidden units: plain and gated.

Shape legend: B images, N tokens, C token width, m full hidden width, w kept width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.elastic.base import ElasticSite
from stratavit.elastic.delta import Weights
from stratavit.elastic.site import Site, mlp_steps


class ElasticMlp(ElasticSite):
    """timm's `Mlp` at any hidden width; common ground of the gated ones."""

    maps = 1
    tensor_names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    fc2: nn.Linear
    act: nn.Module
    drop1: nn.Dropout
    drop2: nn.Dropout

    def __init__(self, stock: Any) -> None:
        super().__init__(stock, 1, stock.fc2.in_features)

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """A norm depends on all hidden units at once."""
        if not isinstance(stock.norm, nn.Identity):
            return "norm", "the norm between fc1 and fc2 depends on every hidden channel at once"
        for part, layer in stock.named_children():
            if part.startswith("fc") and not isinstance(layer, nn.Linear):
                return part, f"expected a Linear layer, found {type(layer).__name__}"
        first = next(layer for layer in stock.children() if isinstance(layer, nn.Linear))
        if first.in_features != stock.fc2.out_features:
            return "fc2", "where a stage ends, the MLP widens tokens, and stays uncut"
        return None

    @property
    def out(self) -> nn.Linear:
        """`fc2`."""
        return self.fc2

    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight ``[m, C]`` and bias ``[m]`` of each map into the hidden units: views."""
        layer = self.get_submodule("fc1")
        assert isinstance(layer, nn.Linear)
        biases = (None,) * self.maps if layer.bias is None else layer.bias.chunk(self.maps)
        return list(zip(layer.weight.chunk(self.maps), biases, strict=True))

    def site(self, name: str) -> Site:
        """See `ElasticSite.site`."""
        return Site(
            name,
            "mlp",
            width=self.full_width,
            heads=1,
            dim=self.fc2.out_features,
            in_biases=self.maps * (self.rows()[0][1] is not None),
            out_bias=self.fc2.bias is not None,
            steps=mlp_steps(self.full_width),
            maps=self.maps,
        )

    def in_weight(self, width: int) -> tuple[Tensor, Tensor | None]:
        """The maps into the hidden units at a width, one after the other; a view where there is one."""
        weights, biases = zip(*((w[:width], None if b is None else b[:width]) for w, b in self.rows()), strict=True)
        if self.maps == 1:
            return weights[0], biases[0]
        return torch.cat(weights), None if biases[0] is None else torch.cat(biases)

    def permute(self, order: Tensor) -> None:
        """Sorts the hidden units: rows of the maps into them and columns of `fc2`, in place."""
        order = order.to(self.fc2.weight.device)
        for tensor in (t for row in self.rows() for t in row if t is not None):
            tensor.copy_(tensor.detach()[order])
        self.fc2.weight.copy_(self.fc2.weight[:, order])

    def norms(self) -> Tensor:
        """L2 norm of each hidden unit's weights, its rows and its column of `fc2`, ``[1, 1, m]``."""
        rows = torch.stack([weight.detach().double().square().sum(dim=1) for weight, _ in self.rows()]).sum(dim=0)
        return (rows + self.fc2.weight.detach().double().square().sum(dim=0)).sqrt().view(1, 1, -1)

    def numbers(self, width: int, weights: Weights) -> dict[str, Any]:
        """Numbers of timm's MLP at a hidden width."""
        in_bias, out_bias = weights.in_bias is not None, weights.out_bias is not None
        return {"hidden_features": width, "fc1_bias": in_bias, "fc2_bias": out_bias}

    def activate(self, x: Tensor) -> Tensor:
        """Outputs of the maps, ``[B, N, maps*w]``, to hidden units ``[B, N, w]``."""
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to tokens ``[B, N, C]``."""
        if self.width == 0 or self.bypassed:
            return self.constant(x)
        weights = self.weights_now()
        hidden = self.drop1(self.activate(F.linear(x, weights.in_weight, weights.in_bias)))  # [B, N, w]
        return self.drop2(self.written(hidden, weights))


class ElasticGlu(ElasticMlp):
    """timm's `GluMlp` (SwiGLU with both maps in one): a hidden unit is a row of each half."""

    maps = 2
    gate_last: bool

    def activate(self, x: Tensor) -> Tensor:
        """Gate and value, multiplied."""
        first, second = x.chunk(2, dim=-1)
        return first * self.act(second) if self.gate_last else self.act(first) * second


class ElasticSwiGlu(ElasticGlu):
    """timm's `SwiGLU`: the maps of gate and value are layers of their own."""

    gate_last = False
    fc1_g: nn.Linear
    fc1_x: nn.Linear

    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the gate, then of the value."""
        return [(layer.weight, layer.bias) for layer in (self.fc1_g, self.fc1_x)]

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Weights of timm's `SwiGLU`."""
        gate, value = weights.in_weight.chunk(2)
        gate_bias, value_bias = (None, None) if weights.in_bias is None else weights.in_bias.chunk(2)
        ours = {"fc1_g.weight": gate, "fc1_g.bias": gate_bias, "fc1_x.weight": value, "fc1_x.bias": value_bias}
        return {**ours, "fc2.weight": weights.out_weight, "fc2.bias": weights.out_bias}
