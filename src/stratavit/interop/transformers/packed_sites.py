"""Attention of Qwen's vision towers: one map for q, k and v, and all images packed into one sequence.

Shape legend: N tokens of all images, C token width, H heads, d full head_dim, a kept width of q and k, w that of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.elastic.attention import Part
from stratavit.elastic.delta import Weights
from stratavit.elastic.site import rotary_width
from stratavit.interop.transformers.map_sites import TheirMap, is_map, parts_of_one
from stratavit.interop.transformers.rotary_sites import TheirRotary, cuts_pairs, picked_positions
from stratavit.interop.transformers.sites import (
    PACKED,
    TheirAttention,
    TheirMlp,
    kind_of_theirs,
    returning,
    run_with,
)


def elastic_kind(module: nn.Module) -> type[TheirAttention | TheirMlp] | None:
    """The elastic class of a module of transformers; None if there is none."""
    if is_map(module):
        return TheirMap
    if not cuts_pairs(module):
        return kind_of_theirs(module)
    return TheirPacked if type(module).__name__ in PACKED else TheirRotary


class TheirPacked(TheirRotary):
    """Attention of a packed sequence ``[N, C]``; `cu_seqlens` says where images, or their windows, begin."""

    @classmethod
    def refusal(cls, stock: Any) -> tuple[str, str] | None:
        """What was cut before."""
        if hasattr(stock, "kept") or type(stock.qkv) is not nn.Linear:
            return "qkv", "some of it is gone already; start from the full model"
        return None

    def parts(self) -> tuple[Part, Part, Part]:
        """See `HeadsSite.parts`."""
        return parts_of_one(self.stock.qkv)

    def tensors(self, weights: Weights) -> dict[str, Tensor | None]:
        """Tensors of the small module, and the columns of sines and cosines that it keeps."""
        width = weights.out_weight.shape[1] // self.heads
        columns, parts = self.scores_at(rotary_width(width, self.full_width))
        qkv = zip(*parts, (weights.in_weight, weights.in_bias), strict=True)
        found = self.last_tensors(weights) | ({} if columns is None else {"kept": columns})
        for name, three in zip(("qkv.weight", "qkv.bias"), qkv, strict=True):
            found[name] = None if three[0] is None else torch.cat(three)
        return found

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Tokens ``[N, C]`` to tokens ``[N, C]``; the arguments of the stock class."""
        if self.width == 0 or self.bypassed:
            return self.constant(hidden_states)
        weights = self.weights_now()
        maps, columns = self.maps(hidden_states.unsqueeze(0), weights, kwargs)

        def written(mixed: Tensor) -> Tensor:
            read = self._prefix(mixed.unsqueeze(0), weights)  # [1, N, H*w]
            if self.observer is not None:
                read = by_window(read, kwargs["cu_seqlens"])
            return self.written(read, weights).flatten(0, 1)

        layers = {"qkv": returning(torch.cat(maps, dim=-1).squeeze(0)), "proj": written}  # [N, 3*H*a]
        args, kwargs = picked_positions(args, kwargs, columns)
        found: Tensor = type(self.stock).forward(run_with(self.stock, layers), hidden_states, *args, **kwargs)
        return found

    def products(self, q: Tensor, k: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The sum over images or windows, as tokens attend to those of their own."""
        bounds = given["cu_seqlens"].tolist()
        cosines, sines = given["position_embeddings"]
        total = None
        for start, stop in pairwise(bounds):
            own = {"position_embeddings": (cosines[start:stop], sines[start:stop])}
            found = super().products(q[:, start:stop], k[:, start:stop], own)
            total = found if total is None else total + found
        assert total is not None, "a sequence holds at least one image"
        return total


def by_window(tokens: Tensor, bounds: Tensor) -> Tensor:
    """Tokens ``[1, N, C]`` as those of images or their windows, ``[windows, n, C]``, where these are of one size."""
    lengths = bounds.diff()
    return tokens.unflatten(1, (len(lengths), -1)).squeeze(0) if bool((lengths == lengths[0]).all()) else tokens
