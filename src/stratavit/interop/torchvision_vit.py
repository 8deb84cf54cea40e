"""torchvision's `VisionTransformer` (vit_b_16 and its siblings), turned into timm's equivalent on entry.

Its attention is `nn.MultiheadAttention`, which cannot be cut; timm's computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stratavit.errors import UnsupportedModelError
from stratavit.files.state_dicts import load_weights, unreachable
from stratavit.interop.checkpoint_names import say_left_out, unwrapped, without_counters
from stratavit.interop.equivalence import check_equivalent
from stratavit.models import architecture
from stratavit.models.freezing import frozen_names, set_frozen

NAMES = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
_PARTS = {  # a name stands for the tensors below it
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm",
    "heads.head": "head",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def is_torchvision(model: Any) -> bool:
    """Whether it is torchvision's ViT; without importing that library."""
    kind = type(model)
    return (kind.__module__, kind.__name__) == ("torchvision.models.vision_transformer", "VisionTransformer")


def to_timm(model: Any) -> nn.Module:
    """timm's equivalent of a model, with copies of its weights, in eval mode.

    Raises:
        UnsupportedModelError: Its stem or head is not the plain one.
    """
    heads = [(name, module) for name, module in model.heads.named_modules() if not list(module.children())]
    linear = [(name, module) for name, module in heads if isinstance(module, nn.Linear)]
    idle = (nn.Linear, nn.Identity, nn.Dropout, nn.Sequential)
    if (
        not isinstance(model.conv_proj, nn.Conv2d)
        or len(linear) > 1
        or any(not isinstance(head, idle) for _, head in heads)
    ):
        raise UnsupportedModelError(
            "cannot cut this torchvision VisionTransformer: expected one convolution as stem and one linear head"
        )
    layer = model.encoder.layers[0]
    classes = linear[0][1].out_features if linear else 0
    args = {
        "img_size": [model.image_size, model.image_size],
        "patch_size": [model.patch_size, model.patch_size],
        "in_chans": model.conv_proj.in_channels,
        "num_classes": classes,
        "global_pool": "token",
        "embed_dim": model.hidden_dim,
        "depth": len(model.encoder.layers),
        "num_heads": layer.num_heads,
        "mlp_ratio": model.mlp_dim / model.hidden_dim,
        "act_layer": None,
        "norm_layer": "layernorm",
    }
    eps = float(model.encoder.ln.eps)
    made: Any = architecture.build({"architecture": "vit_base_patch16_224", "args": args, "norm_eps": eps, "sites": {}})
    head = ".".join(filter(None, ("heads", linear[0][0]))) if linear else "heads"
    names = {
        name: _renamed(f"heads.head{name.removeprefix(head)}" if name.startswith(f"{head}.") else name)
        for name in model.state_dict()
    }
    state = {names[name]: tensor for name, tensor in model.state_dict().items()}
    load_weights(made, state, "torchvision VisionTransformer", assign=False)
    set_frozen(made, [names[name] for name in frozen_names(model)])
    parameter = next(model.parameters())
    made.to(dtype=parameter.dtype, device=parameter.device)
    made.data_config = {
        "input_size": (args["in_chans"], *args["img_size"]),
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    ready: nn.Module = made.eval()
    check_equivalent(ready, model, made.data_config["input_size"])
    return ready


def is_name(name: str) -> bool:
    """Whether torchvision has a ViT of this name."""
    return name in NAMES


def named(name: str, weights: Mapping[str, Tensor] | None, source: str, num_classes: int | None = None) -> nn.Module:
    """timm's equivalent of torchvision's ViT of a name, in eval mode.

    Args:
        name: One of `NAMES`.
        weights: A state dict; torchvision's default weights, downloaded, if None.
        source: Name of the weights, for errors.
        num_classes: Size of the head, if it is not 1,000; the head is new where weights are downloaded.

    Raises:
        ArtifactError: The weights do not fit.
        StrataViTError: They cannot be fetched.
    """
    import torchvision

    if weights is not None:
        model = torchvision.models.get_model(name, num_classes=num_classes or 1000)
        own = model.state_dict()
        named = unwrapped(weights, own, source)
        kept = without_counters(named, own)
        say_left_out(named, kept, source)
        load_weights(model, kept, source)
        return to_timm(model)
    with unreachable(name):
        model = torchvision.models.get_model(name, weights="DEFAULT")
    made: Any = to_timm(model)
    if num_classes is not None:
        made.reset_classifier(num_classes)
    ready: nn.Module = made.eval()
    return ready


def _renamed(name: str) -> str:
    start = "encoder.layers.encoder_layer_"
    block = ""
    if name.startswith(start):
        number, _, name = name.removeprefix(start).partition(".")
        block = f"blocks.{number}."
    for theirs, ours in _PARTS.items():
        if name == theirs or name.startswith(theirs + "."):
            return block + ours + name.removeprefix(theirs)
    return block + name
