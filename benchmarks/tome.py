"""Token merging as published (Bolya et al., ICLR 2023, arXiv 2210.09461), written from the paper: a peer.

In every block r tokens merge: tokens are dealt out alternately to two sets, each of the first set finds the most
similar of the second by the mean of its keys over the heads, and the r most similar pairs merge by their weighted mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stratavit.models.cost import linear_macs

SIZE = (3, 224, 224)


class TokenMerging(nn.Module):
    """A timm `VisionTransformer` with a class token that merges `r` tokens in every block, while that is possible."""

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))  # [B, N, C]
        size = torch.ones_like(x[..., :1])  # [B, N, 1]
        for block in model.blocks:
            attended, keys = attention(block.attn, block.norm1(x), size)
            x = x + block.ls1(attended)
            x, size = merged(x, size, keys, self.r)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))


def attention(layer: nn.Module, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives with every token seen `size` times, and the mean of the keys over the heads."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().transpose(1, 2).unsqueeze(1))
    return layer.proj(out.transpose(1, 2).flatten(2)), k.mean(dim=1)


def merged(x: Tensor, size: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, N, C]`` and sizes ``[B, N, 1]`` after the `r` most similar pairs have merged."""
    r = min(r, (x.shape[1] - 1) // 2)
    if r <= 0:
        return x, size
    unit = F.normalize(keys, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, first, second]
    scores[:, 0] = -torch.inf  # the class token stays
    best, goal = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True).unsqueeze(-1)
    gone, left = order[:, :r], order[:, r:].sort(dim=1).values
    goal = goal.unsqueeze(-1).gather(1, gone)  # [B, r, 1]

    def summed(values: Tensor) -> Tensor:
        first, second = values[:, ::2], values[:, 1::2]
        wide = (-1, -1, values.shape[-1])
        joined = second.scatter_add(1, goal.expand(wide), first.gather(1, gone.expand(wide)))
        return torch.cat([first.gather(1, left.expand(wide)), joined], dim=1)

    total = summed(size)
    return summed(x * size) / total, total


def within(model: nn.Module, share: float) -> tuple[TokenMerging, float] | None:
    """The smallest r that keeps a share of the linear MACs, and the share that it has; None if there is none."""
    dense = linear_macs(model, SIZE)
    models = (TokenMerging(model, r) for r in range(1, 60))
    return next(((one, got) for one in models if (got := linear_macs(one, SIZE) / dense) <= share), None)
