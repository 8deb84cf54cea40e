"""The model card of a repository on the hub: what it holds, how to load it, accuracy against size, where it is from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from stratavit.artifacts.sub_network import site_widths
from stratavit.artifacts.timm_config import needs_stratavit, timm_config
from stratavit.data.class_names import class_names_of
from stratavit.data.image_files import some
from stratavit.evaluation.curve_points import LISTS, Point, by_list
from stratavit.models.architecture import describe, resolve_data_config
from stratavit.utils.model import is_super_network
from stratavit.utils.text import human

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


CARD_FILE, CURVE_FILE = "README.md", "curve.png"
SHARES = ("12/12", "10/12", "8/12", "6/12", "4/12")


def model_card(
    model: nn.Module,
    repo_id: str,
    points: Sequence[Point] = (),
    licence: str | None = None,
    base_model: str | None = None,
) -> str:
    """The card of a `SuperNet` or a small model as Markdown with the hub's front matter.

    Args:
        model: What the repository holds.
        repo_id: ``user/name``.
        points: Accuracy against size, if it was measured.
        licence: Of the weights, the hub's name for it.
        base_model: Repository of the model that it was made from; the one that `convert` recorded if None.
    """
    net: Any = model if is_super_network(model) else None
    provenance: Mapping[str, Any] = getattr(model, "provenance", {})
    description = net.description if net else describe(model)
    config = timm_config(description, net.data_config if net else resolve_data_config(model))
    data = ModelCardData(
        license=licence,
        base_model=base_model or _source(provenance).get("base_model"),
        library_name="stratavit",
        pipeline_tag="image-classification",
        tags=["stratavit", "timm", "vision-transformer", "pruning", "super-network" if net else "sub-network"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        _what(net, description["architecture"], provenance),
        _use(net, repo_id, stock=not needs_stratavit(config)),
        *_classes(model),
        _sizes(net, model, points),
        f"## Licence\n\n{f'`{licence}`' if licence else 'Not stated. It follows that of the source weights.'}",
        "## Provenance\n\n```json\n" + json.dumps(provenance, indent=1, default=str)[:20_000] + "\n```",
    ]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _source(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What `convert` recorded of the source, or a friend's words under ``model``; empty if nothing."""
    source = provenance.get("source") or dict(provenance.get("super_network") or {}).get("source")
    return dict(source) if isinstance(source, Mapping) else {"model": source} if source else {}


def _classes(model: nn.Module) -> list[str]:
    names = class_names_of(model)
    if names is None:
        return []
    return [f"## Classes\n\n{len(names)}, in the order of the head: {some(names)}. All are in `stratavit.json`."]


def _what(net: SuperNet | None, architecture: str, provenance: Mapping[str, Any]) -> str:
    origin = f"`{_source(provenance).get('model', architecture)}`"
    if net is None:
        return f"A small model, sliced out of a super-network of {origin} by StrataViT."
    return (
        f"A super-network of {origin}, made by StrataViT: one set of weights, and any size is a prefix of it. "
        "Ask for a budget and get an ordinary small model."
    )


def _use(net: SuperNet | None, repo_id: str, stock: bool) -> str:
    load = f'stratavit.from_pretrained("{repo_id}"'
    lines = [f"model = {load})"] if net is None else [f"net = {load})  # all sizes"]
    if net is not None and net.strata is not None:
        kind = (
            "a plain timm model" if net.joint_strata is None else 'it merges tokens; axes="width": a plain timm model'
        )
        lines.append(f'small = {load}, macs="50%")  # one, {kind}')
    used = "## Use\n\n```python\nimport stratavit\n\n" + "\n".join(lines) + "\n```"
    what = "the full-size model" if net else "it"
    first = (
        f"timm alone loads {what}, too:"
        if stock
        else f"timm loads {what}, too, after `import stratavit`, which registers its form:"
    )
    imports = "import timm" if stock else "import stratavit\nimport timm"
    call = f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()'
    used += f"\n\n{first}\n\n```python\n{imports}\n\n{call}\n```"
    return used


def _before(point: Point) -> str:
    return " |" if point.before is None else f" {point.before:.2f} |"


def _sizes(net: SuperNet | None, model: nn.Module, points: Sequence[Point]) -> str:
    title, head, rows = "## Sizes", "| MACs, share | MACs | parameters |\n|---|---|---|", []
    note = f"Measured on {points[0].n} images." if points else "Accuracy was not measured."
    if net is None:
        count = human(sum(parameter.numel() for parameter in model.parameters()))
        widths = ", ".join(f"{name} {width}" for name, width in site_widths(model).items())
        title = f"## Size\n\n{count} parameters. Widths: {widths}."
        if not points:
            return f"{title}\n\n{note}"
        title += "\n\n## The super-network that it comes from"
    if points:
        title += f"\n\n![accuracy against size]({CURVE_FILE})"
        head = "| MACs, share | MACs | parameters | top-1 % | top-5 % |\n|---|---|---|---|---|"
        if several := len(by_list(points)) > 1:
            head = "| cut along " + head.replace("\n", "\n|---")
        if earlier := any(p.before is not None for p in points):
            head = head.replace("top-5 % |", "top-5 % | top-1 % before |") + "---|"
            note += " Before: the one-shot network, not recovered or trained yet."
        rows = [
            f"{f'| {LISTS[p.axes]} ' if several else ''}| {p.share:.1%} | {human(p.macs)} | {human(p.params)} | "
            f"{p.top1:.2f} | {p.top5:.2f} |{_before(p) if earlier else ''}"
            for p in points
        ]
    elif net is not None and (strata := net.joint_strata or net.strata) is not None:
        low = net.macs(strata.smallest())
        for share in SHARES:
            part = int(share.removesuffix("/12")) / 12
            if part * net.macs() >= low:
                spec = net.spec(macs=part)
                rows.append(f"| {share} | {human(net.macs(spec))} | {human(net.params(spec))} |")
    return "\n".join([f"{title}\n", head, *rows, "", note])
