"""What the library needs to know of a family of models: one class with a few functions, a page of code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.utils.classifier import classes_in_head


@dataclass(frozen=True)
class Stages:
    """A model's forward pass in three parts: ``tail(blocks(stem(images)))`` equals ``model(images)``.

    Attributes:
        stem: Images ``[B, 3, H, W]`` to tokens ``[B, N, C]`` (Swin: ``[B, H, W, C]``, everywhere).
        blocks: Name of every residual block (or step between blocks), and what it does to tokens.
        tail: Tokens to logits ``[B, classes]``, or to all tokens of a model without pooling.
        pool: Tokens to what the head reads, ``[B, C]``; without pooling the mean of all tokens.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]
    tail: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]

    def outputs(self, images: Tensor) -> Tensor:
        """All three parts: images ``[B, 3, H, W]`` to what the model returns."""
        return self.tail(self.through(self.stem(images)))

    def through(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens that enter block `first` to tokens that come out of the last one."""
        for _, block in self.blocks[first:]:
            tokens = block(tokens)
        return tokens

    def block_of(self, site: str) -> int:
        """Number of the block that a site belongs to."""
        return next(i for i, (name, _) in enumerate(self.blocks) if site.startswith(name + "."))


class Family:
    """A class of models and its forward pass, taken apart; no state: every function gets the model.

    Attributes:
        title: For people.
        model: timm's class.
        fallback: Name of a model of this class, for models that do not know their own name.
        channels_last: Maps of a model without pooling have their channels last; those of others are not supported.
        has_buffers: It computes buffers when it is built, so it cannot be built without storage.
    """

    title: ClassVar[str]
    model: ClassVar[type[nn.Module]]
    fallback: ClassVar[str]
    has_buffers: ClassVar[bool] = True
    channels_last: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Refuses a model of this class that cannot be cut at all.

        Raises:
            UnsupportedModelError: Says which part, and why.
        """
        if not pooling_of(model) and (model.num_classes or classes_in_head(model)):
            refuse("global_pool", "every token has classes of its own; give it num_classes=0, or pool, e.g. 'token'")
        if not pooling_of(model) and not self.channels_last:
            refuse("global_pool", "its maps have their channels in front; pool, e.g. global_pool='avg'")
        for method in ("forward", "forward_features"):
            if getattr(type(model), method) is not getattr(self.model, method):
                refuse(method, f"{type(model).__name__} overrides the order of execution of {self.model.__name__}")

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Names and modules of the residual blocks, each with an ``attn`` and an ``mlp``, in order of execution."""
        yield from ((f"blocks.{number}", block) for number, block in enumerate(model.blocks))

    def stages(self, model: Any) -> Stages:
        """The forward pass in three parts."""
        raise NotImplementedError

    def last_norm(self, model: Any) -> nn.Module | None:
        """The norm whose bias is added to what the head reads; None if there is none with a bias."""
        return with_bias(model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm)

    def layer_scale(self, model: Any, site: str) -> Tensor | None:
        """Factors ``[C]`` of what a site adds to the tokens, or None."""
        name, _, leaf = site.rpartition(".")
        block, number = model.get_submodule(name), 1 if leaf == "attn" else 2
        scale = getattr(block, f"ls{number}", None)
        factors: Tensor | None = getattr(block, f"gamma_{number}", getattr(scale, "gamma", None))
        return factors

    def merging(self, model: Any) -> int | str:
        """Class and register tokens in front of the patches, where blocks can merge tokens; else why they cannot."""
        return f"merging tokens of a {type(model).__name__} is not supported"

    def reads_patches(self, model: Any) -> bool:
        """Whether outputs depend on what the last block makes of the patches, or on prefix tokens alone."""
        pooled = getattr(model, "attn_pool", None) is not None or not getattr(model, "num_prefix_tokens", 0)
        return pooled or pooling_of(model) != "token"

    def fixed_size(self, model: Any) -> tuple[int, int] | None:
        """Height and width of images, if the model takes no others and its patch embedding does not say so."""
        return None

    def arguments(self, model: Any) -> dict[str, Any]:
        """Arguments of `timm.create_model` that build the same model, but for the widths of its sites."""
        raise NotImplementedError


def refuse(module: str, reason: str) -> None:
    """Raises `UnsupportedModelError` for a part of a model."""
    raise UnsupportedModelError(f"cannot cut this model: {module}: {reason}")


def pooling_of(model: Any) -> str:
    """Name of what pools the tokens; empty if nothing does."""
    pooling = getattr(model, "global_pool", None)
    if pooling is None:
        pooling = getattr(model.head, "global_pool", model.head)
    found: str = getattr(pooling, "pool_type", pooling)  # its name, or timm's layer for it
    return found


def with_bias(norm: nn.Module) -> nn.Module | None:
    """The norm, if it has a bias."""
    return norm if getattr(norm, "bias", None) is not None else None


def sizes(model: Any) -> dict[str, Any]:
    """Arguments of `timm.create_model` that models of several classes share."""
    patches = model.patch_embed
    return {
        "img_size": None if patches.img_size is None else list(patches.img_size),
        "patch_size": list(patches.patch_size),
        "in_chans": model.in_chans if hasattr(model, "in_chans") else patches.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": pooling_of(model),
        "embed_dim": model.embed_dim if hasattr(model, "embed_dim") else patches.proj.out_channels,
    }


def heads_of(blocks: Iterable[Any]) -> int | None:
    """Heads of the first attention that is still there; None if all were cut away."""
    return next((block.attn.num_heads for block in blocks if hasattr(block.attn, "num_heads")), None)


def heads_that_divide(dim: int, attention: Iterable[Any]) -> int | None:
    """The largest number of heads that is left and that timm allows, whatever it is in single blocks; or None."""
    heads = {module.num_heads for module in attention if hasattr(module, "num_heads")}
    return max((count for count in heads if dim % count == 0), default=None)


def head_stages(model: Any, stem: Any, blocks: Any, features: Callable[[Tensor], Tensor] | None = None) -> Stages:
    """Stages of a model whose output is ``forward_head(features(tokens))``; without `features` its `norm`."""
    last: Callable[[Tensor], Tensor] = model.norm if features is None else features
    return Stages(
        stem=stem,
        blocks=tuple(blocks),
        tail=lambda tokens: model.forward_head(last(tokens)),
        pool=lambda tokens: mean_token(model.forward_head(last(tokens), pre_logits=True)),
    )


def mean_token(features: Tensor) -> Tensor:
    """Features ``[B, C]`` as they are; the mean of all tokens of maps ``[B, N, C]`` or ``[B, H, W, C]``."""
    return features if features.dim() == 2 else features.flatten(1, -2).mean(dim=1)
