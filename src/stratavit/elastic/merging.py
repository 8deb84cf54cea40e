"""Blocks that merge similar tokens: plain torch, in need of nothing else from this library.

Between attention and MLP of a block, patch tokens that say nearly the same become one. Every third token is a
destination; of the others, those most like a destination join it. A token is the mean of the patches that it stands
for, and attention sees it that many times. The last block puts every patch back in its place, so what comes after
(norm, pooling, dense features) sees as many tokens as ever, each patch with what its token became.

Source of the idea: token merging (Bolya et al., ICLR 2023, arXiv 2210.09461): bipartite matching, and the logarithm of
the size added to the attention scores. Other here: few places, in the midst of the block, compared by what attention
reads, one destination in three, no scatter.

Where the model's outputs read prefix tokens alone (a class token), the last block may drop all patches before its MLP.

Shape legend: B images, N patches, n tokens that stand for them, P prefix tokens (class, registers), C token width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

EVERY = 3  # one token in so many is a destination


class Merged(NamedTuple):
    """What travels between blocks once tokens have been merged.

    All other code (a norm, an index, timm's `forward_intermediates`) sees the tensor ``[B, P+N, C]`` of all patches.

    Attributes:
        tokens: ``[B, P+n, C]``.
        size: Number of patches that each stands for, ``[B, n]`` float32.
        home: Which of the n tokens each patch is in, ``[B, N]``: the map of all merges so far.
        place: The patch whose position a token has, ``[B, n]``.
    """

    tokens: Tensor
    size: Tensor
    home: Tensor
    place: Tensor

    @property
    def prefix(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.size.shape[1]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch on the tensor of all patches."""
        whole = tree_map(_unmerged_if_merged, (args, kwargs or {}), is_leaf=lambda value: isinstance(value, cls))
        return function(*whole[0], **whole[1])

    def __getitem__(self, index: Any) -> Any:
        return unmerge(self)[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(unmerge(self), name)


def _unmerged_if_merged(value: Any) -> Any:
    return unmerge(value) if isinstance(value, Merged) else value


def unmerged(tokens: Tensor, prefix: int) -> Merged:
    """Tokens ``[B, P+N, C]`` of which each stands for itself."""
    batch, count = tokens.shape[0], tokens.shape[1] - prefix
    each = torch.arange(count, device=tokens.device).expand(batch, count)
    return Merged(tokens, torch.ones(batch, count, device=tokens.device), each, each)


def least(count: int) -> int:
    """Tokens that are left at least when `count` are merged once: the destinations."""
    return -(-count // EVERY)


def merge(state: Merged, compared: Tensor, keep: int, prefix: int) -> Merged:
    """Merges the most similar patch tokens until `keep` are left.

    Args:
        state: Tokens ``[B, P+n, C]`` and what they stand for.
        compared: What similarity (cosine) is measured of, ``[B, P+n, *]``.
        keep: Patch tokens afterwards, at least `least` of n.
        prefix: P.
    """
    tokens, size, home, place = state
    count = size.shape[1]
    sources, targets = split(count, tokens.device)
    best, nearest = similarities(compared[:, prefix:], sources, targets).max(dim=-1)  # [B, S]
    order = best.topk(best.shape[1], dim=1).indices  # ONNX has no stable sort
    gone, left = order[:, : count - keep], order[:, count - keep :]
    goal = nearest.gather(1, gone)  # [B, r], among the targets
    joins = (
        goal.unsqueeze(1) == torch.arange(targets.shape[0], device=tokens.device).view(1, -1, 1)
    ).float()  # [B, T, r]
    joining, own = sources[gone], size[:, targets]  # [B, r], [B, T]
    shares = joins * size.gather(1, joining).unsqueeze(1)  # [B, T, r]
    total = own + shares.sum(dim=2)  # [B, T]
    patches = tokens[:, prefix:]
    mixed = patches[:, targets] * (own / total).unsqueeze(2).type_as(tokens)
    mixed = mixed + (shares / total.unsqueeze(2)).type_as(tokens) @ rows(patches, joining)  # [B, T, C]
    kept = torch.cat([sources[left], targets.expand(tokens.shape[0], -1)], dim=1)  # [B, keep]
    kept, rank = kept.sort(dim=1)  # as they lie in the image, so that every third is a grid again
    found = torch.cat([rows(patches, sources[left]), mixed], dim=1)
    sizes = torch.cat([size.gather(1, sources[left]), total], dim=1)
    # where each token went: its own new number, or that of the target it joined
    position = rank.argsort(dim=1)  # [B, keep]: of the left sources, then of the targets
    went = torch.cat([position, position[:, left.shape[1] :].gather(1, goal)], dim=1)  # [B, n], in order of `came`
    came = torch.cat([sources[left], targets.expand(tokens.shape[0], -1), joining], dim=1)
    home = went.gather(1, came.argsort(dim=1)).gather(1, home)
    tokens = torch.cat([tokens[:, :prefix], rows(found, rank)], dim=1)
    return Merged(tokens, sizes.gather(1, rank), home, place.gather(1, kept))


def split(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens that may join another one ``[S]``, and of those that they may join ``[T]``."""
    each = torch.arange(count, device=device)
    return torch.cat([each[offset::EVERY] for offset in range(1, EVERY)]), each[::EVERY]


def similarities(patches: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """Cosines of patches ``[B, n, *]`` with numbers `sources` ``[S]`` and `targets` ``[T]``: ``[B, S, T]``."""
    unit = F.normalize(patches.float(), dim=-1)
    return unit[:, sources] @ unit[:, targets].transpose(1, 2)


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, n, C]`` at ``[B, m]``: ``[B, m, C]``."""
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def unmerge(state: Merged) -> Tensor:
    """Every patch with what its token became: ``[B, P+N, C]``."""
    tokens, prefix = state.tokens, state.prefix
    return torch.cat([tokens[:, :prefix], rows(tokens[:, prefix:], state.home)], dim=1)


class MergingBlock(nn.Module):
    """A residual block (attention, then MLP) of timm that may merge tokens in between; its parts keep their names.

    Without anything merged it computes exactly what the block did.

    Args:
        block: timm's `vision_transformer.Block` or `eva.EvaBlock`; its parts are taken over.
        prefix: Tokens in front that are never merged (class, registers).
        last: Whether it is the model's last block, which puts all patches back.
        keep: Patch tokens that it passes on where there are `full` patches; None merges none. 0, of a last block, drops
            all patches: its output is ``[B, P, C]``.
        full: Patches of an image of the size that `keep` is meant for; other sizes keep the same share.
    """

    stock: type[nn.Module]
    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def __init__(
        self, block: Any, prefix: int, last: bool = False, keep: int | None = None, full: int | None = None
    ) -> None:
        super().__init__()
        vars(self).update(vars(block))
        self.stock, self.prefix, self.last, self.keep, self.full = type(block), prefix, last, keep, full

    def as_stock(self) -> nn.Module:
        """The same parts as timm's own block, which merges nothing."""
        block = object.__new__(self.stock)
        ours = ("stock", "prefix", "last", "keep", "full")
        vars(block).update({name: value for name, value in vars(self).items() if name not in ours})
        return block

    def kept(self) -> int | None:
        """Patch tokens to pass on at the size of `full`; None for all."""
        return self.keep

    def forward(
        self,
        x: Tensor | Merged,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | Merged:
        """Tokens ``[B, P+N, C]``, or those that a block before has merged, to the same, or to ``[B, P, C]``."""
        state = x if isinstance(x, Merged) else None
        tokens = x.tokens if isinstance(x, Merged) else x
        extra: dict[str, Any] = {"is_causal": True} if is_causal else {}
        if state is not None and attn_mask is not None:
            raise ValueError("tokens were merged: a mask of all pairs of patches does not fit them")
        if state is not None:
            attn_mask = log_sizes(state.size, self.prefix, tokens)
        if attn_mask is not None:
            extra["attn_mask"] = attn_mask
        if rope is not None:
            extra["rope"] = rope if state is None else placed(rope, state.place)
        keep = self.kept()
        normed = tokens if keep is None and _constant(self.attn) else self.norm1(tokens)
        tokens = self.added(tokens, self.attn, 1, normed, extra)
        if keep == 0:
            tokens, state = tokens[:, : self.prefix], None
        elif keep is not None:
            before = unmerged(tokens, self.prefix) if state is None else state._replace(tokens=tokens)
            now = before.size.shape[1]
            count = self.passed_on(keep, before.home.shape[1], now)
            if count < now:
                state = merge(before, normed, count, self.prefix)
                tokens = state.tokens
        tokens = self.added(tokens, self.mlp, 2, tokens if _constant(self.mlp) else self.norm2(tokens), {})
        if state is None:
            return tokens
        state = state._replace(tokens=tokens)
        return unmerge(state) if self.last else state

    def passed_on(self, keep: int, patches: int, now: int) -> int:
        """Tokens behind a merge of `now` that stand for so many patches; `now` if it merges none."""
        count = keep if self.full is None else round(patches * keep / self.full)
        return max(count, least(now)) if count < now else now

    def added(self, tokens: Tensor, part: Any, branch: int, normed: Tensor, extra: dict[str, Any]) -> Tensor:
        """Tokens, and what attention (branch 1) or the MLP (2) adds to them; a constant as a vector."""
        if _constant(part) and not self.training:
            scale, own = getattr(self, f"ls{branch}", None), getattr(self, f"gamma_{branch}", None)
            gamma = getattr(scale, "gamma", own)
            return tokens if part.bias is None else tokens + (part.bias if gamma is None else gamma * part.bias)
        drop_path = self.drop_path1 if branch == 1 else self.drop_path2
        return tokens + drop_path(self.scaled(part(normed, **extra), branch))

    def scaled(self, x: Tensor, branch: int) -> Tensor:
        """What a branch adds, times its LayerScale if it has one."""
        scale = getattr(self, f"ls{branch}", None)
        gamma = getattr(self, f"gamma_{branch}", None)
        if scale is not None:
            scaled: Tensor = scale(x)
            return scaled
        return x if gamma is None else gamma * x


def _constant(part: nn.Module) -> bool:
    """Whether attention or MLP has width 0, see `plain.Constant`."""
    return getattr(part, "is_constant", False) is True


def stock_class(block: nn.Module) -> type[nn.Module]:
    """timm's class of a block, also of one that was made to merge tokens, or short (`short_blocks`)."""
    kind = block.stock if isinstance(block, MergingBlock) else type(block)
    found: type[nn.Module] = getattr(kind, "stock", kind)
    return found


def log_sizes(size: Tensor, prefix: int, tokens: Tensor) -> Tensor:
    """What sizes add to the scores of attention, ``[B, 1, 1, P+n]``: a token is seen as often as it has patches."""
    return F.pad(size.log(), (prefix, 0)).unsqueeze(1).unsqueeze(1).type_as(tokens)


def placed(rope: Tensor, place: Tensor) -> Tensor:
    """Sines and cosines ``[..., N, D]`` at the positions that tokens have kept: ``[B, 1 or H, n, D]``."""
    rope = rope if rope.dim() == 4 else rope.unsqueeze(0) if rope.dim() == 3 else rope.view(1, 1, *rope.shape)
    index = place.unsqueeze(1).unsqueeze(3).expand(-1, rope.shape[1], -1, rope.shape[-1])
    return rope.expand(place.shape[0], -1, -1, -1).gather(2, index)
