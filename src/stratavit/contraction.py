"""Folds WPAC's change of coordinates into the weights of elastic modules. The function stays the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stratavit.elastic import ElasticAttention, ElasticMlp, ElasticSite
from stratavit.statistics import SiteStatistics
from stratavit.wpac import AttentionTransform, Criterion, attention_transform, fold_heads, mlp_order


@torch.no_grad()
def apply(
    elastic: Mapping[str, ElasticSite], statistics: Mapping[str, SiteStatistics], criterion: Criterion, seed: int
) -> None:
    """Re-parameterises every site in place.

    Args:
        elastic: Site name -> module.
        statistics: Of each site, from one calibration pass.
        criterion: What channels are sorted by.
        seed: For the ``random`` criterion.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in elastic.items():
        found = statistics[name]
        if isinstance(module, ElasticAttention):
            transform = attention_transform(found, criterion, attention_norms(module), generator)
            fold_attention(module, transform)
            mean = (transform.v.to(found.channel_mean) @ found.channel_mean.unsqueeze(-1)).squeeze(-1)  # [H, d]
        else:
            assert isinstance(module, ElasticMlp)
            order = mlp_order(found, criterion, mlp_norms(module), generator)
            permute_mlp(module, order)
            mean = found.channel_mean[:, order.to(found.channel_mean.device)]  # [1, m]
        set_mean(module, mean)


def set_mean(module: ElasticSite, mean: Tensor) -> None:
    """Gives a module the mean of the channels that its `proj` / `fc2` reads, ``[H, d]`` or ``[1, m]``."""
    module.channel_mean = mean.to(module.out.weight)


def attention_norms(attn: ElasticAttention) -> Tensor:
    """L2 norm of each coordinate's weights, ``[3, H, d]``: rows of q and k; for v rows and columns of `proj`."""
    shape = (3, attn.heads, attn.full_width)
    squares = attn.qkv.weight.double().square().sum(dim=1).view(shape)
    squares[2] += attn.out_by_head().double().square().sum(dim=0)
    return squares.sqrt()


def mlp_norms(mlp: ElasticMlp) -> Tensor:
    """L2 norm of each hidden unit's weights, its row of `fc1` and column of `fc2`, ``[1, 1, m]``."""
    rows, columns = mlp.fc1.weight.double().square().sum(dim=1), mlp.fc2.weight.double().square().sum(dim=0)
    return (rows + columns).sqrt().view(1, 1, -1)


def fold_attention(attn: ElasticAttention, transform: AttentionTransform) -> None:
    """Applies a transform to `qkv` and `proj` in place."""
    for parameter in (attn.qkv.weight, attn.qkv.bias):
        if parameter is not None:
            q, k, v = parameter.detach().chunk(3)
            parts = zip((transform.q, transform.k, transform.v), (q, k, v), strict=True)
            parameter.copy_(torch.cat([fold_heads(matrix, part) for matrix, part in parts]))
    columns = attn.proj.weight.detach().T  # [H*d, C]
    attn.proj.weight.copy_(fold_heads(transform.o.transpose(-1, -2), columns.contiguous()).T)


def permute_mlp(mlp: ElasticMlp, order: Tensor) -> None:
    """Sorts the hidden units: rows of `fc1` and columns of `fc2`, in place."""
    order = order.to(mlp.fc1.weight.device)
    mlp.fc1.weight.copy_(mlp.fc1.weight[order])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.copy_(mlp.fc1.bias[order])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
