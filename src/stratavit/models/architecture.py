"""A model's architecture as JSON, and back: ``timm.create_model(name, **args)`` plus one line per site.

Only plain data is read and written, so loading a model never runs code from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import get_norm_layer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from stratavit.elastic.attention import ElasticBeit
from stratavit.elastic.layers import build_layer, describe_layer
from stratavit.elastic.plain import Constant, SplitAttention
from stratavit.elastic.value_attention import ElasticSplit
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, described, one_line
from stratavit.models.differences import difference
from stratavit.models.families import family_of, kind_of
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import computed_buffers, model_device, model_dtype

DATA_KEYS = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}


def describe(model: nn.Module) -> dict[str, Any]:
    """A JSON-ready description from which `build` makes the same architecture.

    Args:
        model: A timm model of a known family, dense or extracted.

    Returns:
        ``architecture`` and ``args`` for `timm.create_model`, and ``sites``: for every attention and MLP
        module that can be cut its widths and its biases.

    Raises:
        ArtifactError: The model has a part that this description cannot express.
    """
    return described_and_built(model)[0]


def described_and_built(model: nn.Module) -> tuple[dict[str, Any], nn.Module]:
    """The same, and the model that was built from it to compare.

    Raises:
        ArtifactError: See `describe`.
    """
    try:
        family = family_of(model)
        model = with_plain_head(model)
    except UnsupportedModelError as error:
        raise ArtifactError(f"cannot describe a {type(model).__name__}: {error}") from error
    config = getattr(model, "pretrained_cfg", None) or {}
    distilled = isinstance(model, VisionTransformerDistilled)
    fallback = "deit_tiny_distilled_patch16_224" if distilled else family.fallback
    name = config.get("architecture") or fallback
    description: dict[str, Any] = {
        "architecture": name if timm.is_model(name) else fallback,
        "args": {**getattr(model, "source_args", {}), **family.arguments(model)},  # heads may all be cut away
        "sites": {},
    }
    if getattr(model, "embedding", False):
        description["embedding"] = True
    blocks = list(family.blocks(model))
    if "norm_layer" in description["args"]:
        description["norm_eps"] = float(getattr(blocks[0][1].norm1, "eps", 1e-6))
    for block_name, block in blocks:
        for leaf in ("attn", "mlp"):
            module = getattr(block, leaf)
            if _is_cut(module):
                description["sites"][f"{block_name}.{leaf}"] = describe_layer(f"{block_name}.{leaf}", module)
    bare = next(model.parameters()).is_meta  # then its buffers are nothing to compare with
    built = build(description, "meta", computed=not bare)
    other = difference(built, model)
    if other:
        raise ArtifactError(f"cannot describe this model as timm's {description['architecture']}: {other}")
    return description, built


def filled(built: nn.Module, model: nn.Module) -> nn.Module:
    """A model built from a description, with the weights of another: shared, not copied; eval mode."""
    built.load_state_dict(model.state_dict(), strict=True, assign=True)
    cast_computed(built, model_dtype(model))
    return built.to(model_device(model)).eval()


def cast_computed(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the buffers that a model computed in float32 when it was built."""
    for _, module, key, buffer in computed_buffers(model):
        if buffer.is_floating_point():
            setattr(module, key, buffer.to(dtype))


def _is_cut(module: nn.Module) -> bool:
    """Whether a module is one that cutting leaves: those kept whole are as `timm.create_model` makes them."""
    if isinstance(module, Constant | SplitAttention):
        return True
    kind = kind_of(module)
    return kind is not None and not issubclass(kind, ElasticSplit | ElasticBeit) and kind.refusal(module) is None


def build(description: Mapping[str, Any], device: torch.device | str = "cpu", computed: bool = True) -> nn.Module:
    """The architecture that `describe` wrote, with untrained weights, built by timm.

    Args:
        description: See `describe`.
        device: ``meta`` is without storage, for families that compute nothing when they are built; else it is the CPU.
        computed: If not, ``meta`` is without storage for all families, buffers included.

    Raises:
        ArtifactError: The description is incomplete or timm cannot build it.
    """
    with torch.random.fork_rng(devices=[]):  # what comes after draws the same numbers as without
        return _built(description, device, computed)


def _built(description: Mapping[str, Any], device: torch.device | str, computed: bool) -> nn.Module:
    try:
        if not timm.is_model(description["architecture"]):
            raise ArtifactError(f"timm {timm.__version__} has no model named {described(description['architecture'])}")
        args = dict(description["args"])
        if "norm_layer" in args:
            args["norm_layer"] = partial(get_norm_layer(args["norm_layer"]), eps=float(description["norm_eps"]))
        model: nn.Module = timm.create_model(description["architecture"], device=device, **args)
        if torch.device(device).type == "meta" and computed and family_of(model).has_buffers:
            return _built(description, "cpu", computed)
        model.embedding = bool(description.get("embedding", False))  # type: ignore[assignment]
        for name, numbers in description["sites"].items():
            parent, _, leaf = name.rpartition(".")
            block = model.get_submodule(parent)
            like = getattr(block, leaf)
            setattr(block, leaf, build_layer(numbers, width_of(like), like, device))
    except ArtifactError:
        raise
    except Exception as error:  # a description from a file can be wrong in any way that timm does not check
        raise ArtifactError(
            f"the model description cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error
    return model


def width_of(module: Any) -> int:
    """Token width C that a stock attention or MLP module writes."""
    out: nn.Linear = module.proj if hasattr(module, "proj") else module.fc2
    return out.out_features


def merged_data_config(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The data configuration of a model, with what a user says in place of its own.

    Raises:
        StrataViTError: A key is none of those that timm has.
    """
    config = resolve_data_config(model)
    unknown = sorted(set(given or {}) - set(config) - DATA_KEYS)
    if unknown:
        raise StrataViTError(f"data_config: {described(unknown[0])} is none of {', '.join(sorted(DATA_KEYS))}")
    return config | dict(given or {})


def channels_of(patches: Any, otherwise: int = 3) -> int:
    """Channels of the images that a patch embedding reads; of a hybrid those that its convolutions read."""
    own: Any = getattr(patches, "in_chans", None) or getattr(getattr(patches, "proj", None), "in_channels", otherwise)
    return int(own)


def own_size(model: nn.Module, size: Sequence[int]) -> tuple[int, ...]:
    """The size ``(C, H, W)`` of images for a model: as given, but H and W its own if it takes no other."""
    patches: Any = getattr(model, "patch_embed", None)
    fixed = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
    return (size[0], *(fixed or size[1:]))


def resolve_data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, its input size checked against the model itself."""
    stored = getattr(model, "data_config", None)
    if isinstance(stored, dict):
        return stored | {"input_size": own_size(model, stored["input_size"])}
    config = dict(resolve_model_data_config(model))
    patches: Any = model.patch_embed
    channels = channels_of(patches)
    size = patches.img_size
    if size is not None:
        config["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        config[key] = tuple(float(x) for x in config[key])[:channels]
    return config
