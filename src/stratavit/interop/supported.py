"""What is supported, to what degree and why not more: found out from the models themselves."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from stratavit.errors import ArtifactError, StrataViTError, UnsupportedModelError, one_line
from stratavit.interop.timm_name import NAME
from stratavit.interop.transformers import in_place
from stratavit.interop.transformers.layouts import LAYOUTS
from stratavit.models import architecture, source_checks
from stratavit.models.cost import cost_model
from stratavit.models.families import elastic_sites, family_of, find_sites, stages

EXAMPLES = {  # what it stands for -> a timm model of it
    "ViT, AugReg, MAE": "vit_base_patch16_224",
    "DeiT": "deit_base_patch16_224",
    "DeiT, distilled (two heads)": "deit_base_distilled_patch16_224",
    "DeiT-III (LayerScale)": "deit3_base_patch16_224",
    "CLIP image towers": "vit_base_patch16_clip_224",
    "SigLIP image towers (attention pooling)": "vit_base_patch16_siglip_224",
    "DINOv2, also with registers": "vit_small_patch14_reg4_dinov2",
    "DINOv2 giant, AIMv2 (SwiGLU)": "vit_giant_patch14_dinov2",
    "EVA": "eva_giant_patch14_224",
    "EVA-02 tiny, small (rotary, SwiGLU)": "eva02_tiny_patch14_224",
    "EVA-02 base, large": "eva02_base_patch14_224",
    "DINOv3 (rotary)": "vit_small_patch16_dinov3",
    "RoPE-ViT, Perception Encoder": "vit_small_patch16_rope_mixed_224",
    "BEiT, BEiT-v2": "beit_base_patch16_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin-V2": "swinv2_tiny_window8_256",
    "Swin-V2, CR (timm's first Swin-V2)": "swinv2_cr_tiny_224",
    "ViT with relative positions": "vit_relpos_base_patch16_224",
    "NaFlex ViT, C-RADIO (images of one size)": "naflexvit_base_patch16_gap",
    "SAM image encoders": "samvit_base_patch16",
    "PiT": "pit_s_224",
    "CaiT": "cait_xxs24_224",
    "XCiT": "xcit_tiny_12_p16_224",
    "VOLO": "volo_d1_224",
    "Twins": "twins_svt_small",
    "NesT": "nest_tiny",
    "DaViT": "davit_tiny",
    "Hiera": "hiera_tiny_224",
    "SAM 2's image encoders (Hiera)": "sam2_hiera_tiny",
    "GC-ViT": "gcvit_xxtiny",
    "MViT-V2": "mvitv2_tiny",
    "BEiT-3": "beit3_base_patch16_224",
    "Hybrids (a ResNet as the stem)": "vit_small_r26_s32_224",
    "Parallel blocks": "vit_base_patch16_xp_224",
}
OPEN_CLIP = (  # what towers of it must be like
    "with pooling by the class token or the mean, and one output",
    "with at most one linear layer behind the trunk",
)
REAL = {  # what it stands for -> models whose published weights it was tested with
    "ViT, AugReg, MAE": "ViT-Tiny (AugReg)",
    "DeiT": "DeiT-Tiny",
    "DINOv2, also with registers": "DINOv2 ViT-S/14",
}


class Support(NamedTuple):
    """What can be cut of a model.

    Attributes:
        name: Of the model, in timm.
        family: Title of its family; empty if it has none.
        attention: ``q, k, v``, ``q, k by pairs, v`` (rotation pairs), ``v`` (q and k stay uncut), or ``uncut``.
        mlp: ``yes``, or ``uncut``.
        reason: Why not more; empty if all can be cut.
    """

    name: str
    family: str
    attention: str
    mlp: str
    reason: str


@cache
def support_of(name: str) -> Support:
    """What can be cut of timm's model of a name, built without weights: every step of a conversion is tried."""
    model = timm.create_model(name, device="meta").eval()
    try:
        title = family_of(model).title
        source_checks.check_layers(model)
        found, uncut = elastic_sites(model)
        architecture.describe(model)
        _run(model)
    except (UnsupportedModelError, ArtifactError) as error:
        return Support(name, "", "uncut", "uncut", str(error).removeprefix("cannot cut this model: "))
    attention: list[Any] = [module for module in found.values() if module.attention]
    by_pairs = [module for module in attention if module.site("").rotary]
    whole = [module for module in attention if not module.tied and module not in by_pairs]
    cut = "uncut" if not attention else "v" if whole else "q, k by pairs, v" if by_pairs else "q, k, v"
    mlp = "yes" if len(attention) < len(found) else "uncut"
    reasons = [text.split(": ", 1)[1] for text in uncut.values()]
    reasons += [f"q and k stay uncut ({module.reason})" for module in whole]
    return Support(name, title, cut, mlp, "; ".join(dict.fromkeys(reasons)))


def _run(model: nn.Module) -> None:
    """Counts a model's costs and runs it, without numbers."""
    try:
        size = architecture.merged_data_config(model, None)["input_size"]
        cost_model(model, find_sites(model), size)
        with torch.no_grad():
            stages(model).outputs(torch.zeros(1, *size, device="meta"))
    except Exception as error:  # of timm or torch, whatever a form of model does that none of ours does
        raise UnsupportedModelError(f"it cannot be run: {type(error).__name__}: {one_line(error)}") from error


def rows(pattern: str | None = None) -> list[dict[str, Any]]:
    """What each row stands for, and its support, as plain data.

    Args:
        pattern: Names in timm, such as ``vit_*dinov3``; the examples, transformers and torchvision if None, with the
            weights that they were tested with: published ones of some model, else small models of random weights.

    Raises:
        StrataViTError: Nothing matches.
    """
    if pattern is not None:
        names = [name for name in timm.list_models(pattern) if name != NAME]
        if not names:
            raise StrataViTError(f"timm {timm.__version__} has no model that matches {pattern!r}; try 'vit_*'")
        found = [("", support_of(name)) for name in names]
    else:
        found = [(title, support_of(name)) for title, name in EXAMPLES.items()]
        for name, layout in LAYOUTS.items():
            one = support_of(layout.architecture)._replace(name=name, family="transformers")
            found.append((f"transformers {name}", one))
        one = support_of("vit_base_patch16_224")._replace(name="vit_b_16", family="torchvision")
        found.append(("torchvision vit_b_16 and its siblings", one))
        one = support_of("vit_base_patch16_clip_224")._replace(name="VisionTransformer", family="open_clip")
        found.append(("open_clip's own tower, `model.visual`", one._replace(reason=OPEN_CLIP[0])))
        trunk = Support("TimmModel", "open_clip", "as its trunk", "as its trunk", OPEN_CLIP[1])
        found.append(("open_clip with a trunk of timm, `model.visual`", trunk))
        for title, known in (("in place", in_place.IN_PLACE), ("in place, the part of", in_place.HOSTS)):
            for name, degrees in known.items():
                found.append((f"{title} transformers {name}", Support(name, "transformers, in place", *degrees)))
    weights = {} if pattern is not None else {title: REAL.get(title, "random") for title, _ in found}
    return [{"models": title, **one._asdict(), "weights": weights.get(title, "")} for title, one in found]


def markdown(table: list[dict[str, Any]]) -> str:
    """The table of docs/models.md."""
    columns = ("models", "name", "attention", "mlp", "weights", "reason")
    lines = ["| models | example | attention | MLP | tested with | why not more |", "|---|---|---|---|---|---|"]
    for row in table:
        lines.append("| " + " | ".join(f"`{row[key]}`" if key == "name" else row[key] for key in columns) + " |")
    return "\n".join(lines)
