"""A model's architecture as JSON, and back: ``timm.create_model(name, **args)`` plus one line per site.

Only plain data is read and written, so loading a model never runs code from a file. What the description cannot
express is found by comparing the model, part by part, with what is built from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention, DropPath, PatchDropout, PatchDropoutWithIndices, get_norm_layer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from stratavit.elastic.layers import build_layer, describe_layer
from stratavit.elastic.plain import Constant, SplitAttention
from stratavit.elastic.short_blocks import shorten
from stratavit.elastic.token_places import check_tokens, place_of
from stratavit.elastic.tokens import merge_at
from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, described, one_line
from stratavit.models.families import blocks_of, family_of, fixed_size, kind_of, merging, reads_patches
from stratavit.spec import TOKENS
from stratavit.utils.classifier import with_plain_head
from stratavit.utils.model import computed_buffers, model_device, model_dtype, patches_of

DATA_KEYS = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
_TRANSIENT = (nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices, nn.Identity)  # of training only
_ASIDE = {
    *(
        "training",
        "fused_attn",
        "grad_checkpointing",
        "data_config",
        "provenance",
        "init_values",
        "embedding",
        "whole_heads",
    ),
    "source_architecture",
    *("attends", "feeds", "has_factors"),  # of a short block, which models pickled by older releases do not have
    "target_shift_size",  # of windows: read when these are set again, and then only whether it is 0
}


# ---- description ---------------------------------------------------------------------------------------------------


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
    distilled = isinstance(model, VisionTransformerDistilled)
    fallback = "deit_tiny_distilled_patch16_224" if distilled else family.fallback
    own = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    name = getattr(model, "source_architecture", None) or own or fallback
    description: dict[str, Any] = {
        "architecture": name if timm.is_model(name) else fallback,
        "args": {**getattr(model, "source_args", {}), **family.arguments(model)},  # heads may all be cut away
        "sites": {},
    }
    description |= {name: True for name in ("embedding", "whole_heads") if getattr(model, name, False)}
    blocks = list(family.blocks(model))
    if "norm_layer" in description["args"]:
        description["norm_eps"] = float(getattr(blocks[0][1].norm1, "eps", 1e-6))
    for block_name, block in blocks:
        for leaf in ("attn", "mlp"):
            site, module = f"{block_name}.{leaf}", getattr(block, leaf)
            if _is_cut(module):
                description["sites"][site] = describe_layer(site, module)
    keep = {name: block.keep for name, block in blocks if getattr(block, "keep", None) is not None}
    if keep:
        description["tokens"] = {
            "patches": next(block.full for _, block in blocks if hasattr(block, "keep")),
            "keep": keep,
        }
    bare = next(model.parameters()).is_meta  # then its buffers are nothing to compare with
    built = build(description, "meta", computed=not bare)
    differs = difference(built, model)
    if differs:
        raise ArtifactError(f"cannot describe this model as timm's {description['architecture']}: {differs}")
    return description, built


def _is_cut(module: Any) -> bool:
    """Whether cutting made a module what it is; those that stay uncut are as `timm.create_model` makes them."""
    if isinstance(module, Constant | SplitAttention):
        return True
    if type(module) is Attention and module.proj.in_features != module.proj.out_features:
        return True  # of whole heads, also with qk-norm
    kind = kind_of(module)
    return kind is not None and not kind.split and kind.refusal(module) is None


def build(description: Mapping[str, Any], device: torch.device | str = "cpu", computed: bool = True) -> nn.Module:
    """The architecture that `describe` wrote, with untrained weights, built by timm.

    Args:
        description: See `describe`.
        device: ``meta`` is without storage, for families that compute nothing when they are built; else it is the CPU.
        computed: If not, ``meta`` is without storage for all families, buffers included.

    Raises:
        ArtifactError: The description is incomplete or timm cannot build it.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # what comes after draws the same numbers as without
            return _built(description, device, computed)
    except ArtifactError:
        raise
    except Exception as error:  # a description from a file can be wrong in any way that timm does not check
        raise ArtifactError(
            f"the model description cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error


def _built(description: Mapping[str, Any], device: torch.device | str, computed: bool) -> nn.Module:
    name, args = description["architecture"], dict(description["args"])
    if not timm.is_model(name):
        raise ArtifactError(f"timm {timm.__version__} has no model named {described(name)}")
    if "norm_layer" in args:
        args["norm_layer"] = partial(get_norm_layer(args["norm_layer"]), eps=float(description["norm_eps"]))
    model: Any = timm.create_model(name, device=device, **args)
    if torch.device(device).type == "meta" and computed and family_of(model).has_buffers:
        return _built(description, "cpu", computed)
    model.embedding, model.whole_heads = (bool(description.get(name)) for name in ("embedding", "whole_heads"))
    for site, numbers in description["sites"].items():
        like: Any = model.get_submodule(site)
        out = like.proj if hasattr(like, "proj") else like.fc2
        model.set_submodule(site, build_layer(numbers, out.out_features, like, device))
    if "tokens" in description:
        merge_tokens(model, description["tokens"])
    if any("constant" in numbers for numbers in description["sites"].values()):
        shorten(model, blocks_of(model))
    made: nn.Module = model
    return made


def merge_tokens(model: nn.Module, tokens: Mapping[str, Any]) -> None:
    """Makes blocks of a plain model merge tokens, see `tokens.merge_at`; ``{"patches": N, "keep": {block: n}}``.

    Raises:
        ArtifactError: The model has no such blocks, or they cannot merge so.
    """
    prefix, blocks, full, keep = merging(model), blocks_of(model), tokens["patches"], tokens["keep"]
    if isinstance(prefix, str):
        raise ArtifactError(f"the model description merges tokens, but {prefix}")
    unread = not reads_patches(model)
    places = [place_of(name, full, prefix, unread and name == blocks[-1]) for name in blocks]
    if not keep or not keep.keys() <= {*blocks} or not all(type(n) is int for n in (full, *keep.values())):
        raise ArtifactError(f"the model description merges tokens at {described(keep)} of {described(full)}")
    if keep.get(blocks[-1]) == 0 and not unread:
        raise ArtifactError(
            f"the model's outputs read the patches that its {blocks[-1]} drops; pool the class token again, or extract "
            f"a size whose spec leaves {blocks[-1]}{TOKENS} out"
        )
    check_tokens(places, {name + TOKENS: count for name, count in keep.items()})
    merge_at(model, blocks, keep, full, prefix)


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


# ---- comparison ----------------------------------------------------------------------------------------------------


def difference(built: nn.Module, model: nn.Module) -> str | None:
    """What makes a model differ from one that timm built, apart from weights and dropout rates; None if alike.

    Returns:
        The first part that differs, what it is, what was expected and what to do.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    ours, theirs = _parts(built, dtype), _parts(model, dtype)
    names = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    if not names:
        return None
    # what was added says more than what follows from it, and another module more than its tensors
    name = min(names, key=lambda name: (name in ours or name.rpartition(".")[0] in ours.keys() & names, name))
    if name not in ours and name in dict(model.named_buffers()):
        return f"{name} is a buffer that it does not have (a profiler or a counter left it): delete it"
    found = f"is {theirs[name]}" if name in theirs else "is missing"
    return (
        f"{name} {found}, expected {ours.get(name, 'no such part')}: put that back, merge what was added into the "
        "weights, or build the model by timm.create_model with the option that was changed"
    )


def _parts(root: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Every module, its plain attributes, and all shapes."""
    lines: dict[str, str] = {}
    for name, module in root.named_modules():
        if isinstance(module, _TRANSIENT):
            continue
        if name:
            kind = getattr(type(module), "stock", type(module))  # timm's, of a short block
            lines[name] = f"{kind.__name__}({module.extra_repr()})"
        for key, value in vars(module).items():
            if key not in _ASIDE and not key.startswith("_") and _is_plain(value):
                lines[f"{name}.{key}".lstrip(".")] = str(tuple(value) if isinstance(value, list) else value)
    lines |= {name: f"a buffer of shape {tuple(buffer.shape)}" for name, buffer in root.named_buffers()}
    for name, _, _, buffer in computed_buffers(root):  # they follow from the arguments, or differ
        lines.pop(name, None)
        if not buffer.is_meta:
            rounded = buffer.detach().to(dtype) if buffer.is_floating_point() else buffer.detach()
            digest = hashlib.blake2b(rounded.double().cpu().numpy().tobytes(), digest_size=16).hexdigest()
            lines[name] = f"a buffer of shape {tuple(buffer.shape)} that holds {digest}"
    return lines | {name: f"of shape {tuple(p.shape)}" for name, p in root.named_parameters()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | bool)


# ---- images --------------------------------------------------------------------------------------------------------


def merged_data_config(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The data configuration of a model, with what a user gives in place of its own.

    Raises:
        StrataViTError: A key is not one of timm's.
    """
    config = resolve_data_config(model)
    unknown = sorted(set(given or {}) - set(config) - DATA_KEYS)
    if unknown:
        raise StrataViTError(f"data_config: {described(unknown[0])} is none of {', '.join(sorted(DATA_KEYS))}")
    return config | dict(given or {})


def resolve_data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of a model, its input size checked against the model itself."""
    stored = getattr(model, "data_config", None)
    if isinstance(stored, dict):
        return stored | {"input_size": own_size(model, stored["input_size"])}
    config = dict(resolve_model_data_config(model))
    patches: Any = patches_of(model)
    channels = channels_of(model)
    side = fixed_size(model) or getattr(patches, "img_size", None) or getattr(patches, "default_img_size", None)
    if side is not None:
        config["input_size"] = (channels, *side)
    for key in ("mean", "std"):
        config[key] = tuple(float(x) for x in config[key])[:channels]
    return config


def channels_of(model: Any, otherwise: int = 3) -> int:
    """Channels of the images that a model reads; if it does not say so, those that its patch embedding reads."""
    patches = patches_of(model)
    read: Any = getattr(patches, "in_chans", None) or getattr(getattr(patches, "proj", None), "in_channels", otherwise)
    own: Any = getattr(model, "in_chans", None)
    return int(own or read)


def own_size(model: nn.Module, size: Sequence[int]) -> tuple[int, ...]:
    """The size ``(C, H, W)`` of images for a model: as given, but H and W its own if it accepts no other."""
    patches: Any = patches_of(model)
    fixed = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
    return (size[0], *(fixed_size(model) or fixed or size[1:]))
