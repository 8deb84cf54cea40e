"""What timm builds and loads for the name that StrataViT registers: small models that timm's arguments do not describe.

timm itself reads the folder or repository and loads the weights; only the building is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from stratavit.elastic.plain import SplitAttention
from stratavit.errors import ArtifactError, described
from stratavit.interop.timm_filter import filter_of
from stratavit.interop.timm_name import FORMAT_VERSION, KEY, NAME
from stratavit.models import architecture
from stratavit.models.size_checks import check_numbers

SOURCE = f"config.json: {KEY}"


def create(pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Builds a model of `architecture.describe`, and lets timm load its weights, strictly.

    Args:
        pretrained: Load weights.
        kwargs: What timm passes: ``model_args`` of the ``config.json``, under the arguments of the caller.

    Returns:
        The model, or timm's wrapper of its features if the caller asks for these.

    Raises:
        ArtifactError: There is no description, or it is of a newer format, or cannot be built.
    """
    form = _form(kwargs.pop(KEY, None))
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = {"architecture": NAME}
    features = {"feature_cls": "getter", "out_indices": kwargs.pop("out_indices", 3)}
    model: nn.Module = build_model_with_cfg(
        partial(_build, form),
        NAME,
        pretrained,
        pretrained_filter_fn=partial(_fitted, str(form.get("architecture"))),
        feature_cfg=features,
        **kwargs,
    )
    return model


def _form(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ArtifactError(
            f"{NAME} has no widths of its own: load the folder or repository of a small model, "
            "timm.create_model('local-dir:FOLDER', pretrained=True)"
        )
    if found.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{SOURCE}: format version {described(found.get('format_version'))} is not {FORMAT_VERSION}; "
            "load it with the StrataViT release that wrote it"
        )
    return {key: value for key, value in found.items() if key != "format_version"}


def _build(form: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None, **args: Any) -> nn.Module:
    """The model with untrained weights; without storage where the caller asks for that."""
    check_numbers(args, {}, SOURCE)
    check_numbers(form.get("sites"), {}, SOURCE)
    device = torch.get_default_device() if device is None else torch.device(device)
    description = {**form, "args": args}
    made: Any = architecture.build(description, device, computed=False).to(dtype=dtype)
    if device.type == "meta":
        _remember_buffers(made, description)
    made.source_architecture = form["architecture"]  # `pretrained_cfg` has the registered name
    made.source_args = {key: value for key, value in args.items() if "drop" not in key}
    return made


def _remember_buffers(made: nn.Module, description: Mapping[str, Any]) -> None:
    """Lets attention that is not timm's own fill its buffers when a loader gives it storage, by timm's protocol."""
    bare = [name for name, module in made.named_modules() if isinstance(module, SplitAttention) and _own(module)]
    full = architecture.build(description, "cpu") if bare else made
    for name in bare:
        module: Any = made.get_submodule(name)
        module.init_non_persistent_buffers = partial(_fill, module, _own(full.get_submodule(name)))


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that no file holds."""
    return {key: getattr(module, key) for key in module._non_persistent_buffers_set if getattr(module, key) is not None}


def _fill(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(module, name, buffer.to(getattr(module, name).device))


def _fitted(name: str, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights for a model, resampled as timm does where another image size was asked for, else as they are."""
    own, cfg = model.state_dict(), model.pretrained_cfg
    replaced = [cfg.get("first_conv"), cfg.get("classifier")]  # timm itself fits these
    heads = tuple(f"{head}." for one in replaced if one for head in ([one] if isinstance(one, str) else one))
    others = {key: value for key, value in tensors.items() if key in own and not key.startswith(heads)}
    run = filter_of(name)
    if run is None or all(own[key].shape == value.shape for key, value in others.items()):
        return dict(tensors)
    return dict(run(dict(tensors), model))
