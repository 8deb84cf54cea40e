"""One HTML page about a super-network: every size, its accuracy, the dropout list, where it is from. Needs no network.

The page is `page/page.html` with style, scripts and data put in. All arithmetic on sizes is done here; what the page
computes is which site has which width at a position of the list.
"""

from __future__ import annotations

import html
import json
import math
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import timm
import torch

from stratavit.choices import ListAxes
from stratavit.dropout_list.strata import Strata
from stratavit.errors import ArtifactError, StrataViTError
from stratavit.evaluation.curve_points import Point
from stratavit.evaluation.latency import Setting, runner
from stratavit.evaluation.turns import flat, take_turns
from stratavit.files.folders import check_free_file, write_file
from stratavit.reports.curve import lists_in, title_of
from stratavit.version import __version__

if TYPE_CHECKING:
    from stratavit.supernet import SuperNet


SCRIPTS = ("common.js", "curve.js", "sizes.js", "list.js", "facts.js", "start.js")
_PLACE = re.compile(r"\{\{(title|style|script|data)\}\}")


def write_report(
    net: SuperNet,
    path: str | Path,
    points: Sequence[Point] = (),
    title: str | None = None,
    overwrite: bool = False,
    *,
    latency: Setting | None = None,
    run: str = "RUN",
) -> Path:
    """Writes one HTML page that shows a super-network in a browser; it holds all it needs, and asks no server.

    Args:
        net: With a dropout list.
        path: File to write.
        points: Accuracy against size, see `curve`; without them the page shows sizes only.
        title: Of the page; source and method if None.
        overwrite: Replace the file if it is there.
        latency: Time the points on the device that the weights are on, in this setting.
        run: Folder of the super-network, for the command that extracts what is shown.

    Returns:
        The file.

    Raises:
        StrataViTError: There is no dropout list, points that are not of this list, or none to time.
        ArtifactError: The file exists or cannot be written, or the provenance holds what JSON does not have.
    """
    check_free_file(path, overwrite)
    data = _data(net, points, title, run)
    if latency is not None:
        _add_latency(data, net, latency)
    return write_file(path, _page(data), overwrite)


def _data(net: SuperNet, points: Sequence[Point], title: str | None, run: str) -> dict[str, Any]:
    """What the page shows, as plain values; of each entry of the list, number of the site and width afterwards."""
    axes, lists = list_shown(net, points), lists_in(net)
    strata, sizes = lists[axes], {name: _sizes(net, one) for name, one in lists.items()}
    merging = {entry.site for entry in strata.entries}
    rows = [[site.name, site.kind, list(site.steps), 0 if site.whole_heads else site.heads] for site in net.sites]
    rows += [[place.name, "tokens", sorted({0, *place.steps}), 0] for place in net.cost.places if place.name in merging]
    number = {row[0]: i for i, row in enumerate(rows)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    return {
        "title": title_of(net) if title is None else title,
        "method": net.method,
        "compensation": net.compensation,
        "extract": f"stratavit extract {shlex.quote(run)}{' --axes both' * (axes == 'both')}",
        "list": axes,
        "curve": f"stratavit curve {shlex.quote(run)}",
        "sites": rows,
        "whole": dict(net.uncut),
        "entries": [[number[entry.site], entry.width] for entry in strata.entries],
        "stops": strata.group_ends() if net.method == "paper" else None,
        "macs": [macs for macs, _ in sizes[axes]],
        "params": [params for _, params in sizes[axes]],
        "points": [_shown(point, sizes.get(point.axes, [])) for point in points],
        "latency": None,
        "facts": {
            "method": {
                "method": net.method,
                "compensation": net.compensation,
                "units": net.units if net.units == "gpu" else list(net.units),
            },
            "model": {key: value for key, value in net.description.items() if key != "sites"},
            "input": net.data_config,
            **{f"provenance: {key}": value for key, value in net.provenance.items()},
            "versions": {"stratavit": __version__, **versions},
        },
    }


def list_shown(net: SuperNet, points: Sequence[Point]) -> ListAxes:
    """The list that the page goes along: that over both axes if there is one, unless points are of the other alone.

    Raises:
        StrataViTError: There is no list.
    """
    both = "both" in lists_in(net) and (not points or any(point.axes == "both" for point in points))
    return "both" if both else "width"


def _sizes(net: SuperNet, strata: Strata) -> list[tuple[int, int]]:
    """MACs and parameters at every position of a list."""
    specs = (strata.spec(position) for position in range(len(strata) + 1))
    return [(net.macs(spec), net.params(spec)) for spec in specs]


def _shown(point: Point, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """A point with its position in the list; what is not finite becomes None."""
    if (point.macs, point.params) not in sizes:
        raise StrataViTError(
            f"the curve is not of this super-network: no position of its list has {point.macs} MACs and {point.params} "
            "parameters; measure it again with `stratavit curve`"
        )
    row = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in vars(point).items()
    }
    return row | {"position": sizes.index((point.macs, point.params)), "ms": None}


def _add_latency(data: dict[str, Any], net: SuperNet, setting: Setting) -> None:
    """Times the points of a page side by side, in turns, and notes how."""
    if not data["points"]:
        raise StrataViTError("latency is measured at the points of the curve; give points (--curve or --data)")
    lists = lists_in(net)
    models = [net.small_at(lists[point["axes"]].spec(point["position"])) for point in data["points"]]
    runs = [runner(model, net.data_config["input_size"], setting) for model in models]
    for point, times in zip(data["points"], take_turns(runs, setting), strict=True):
        point["ms"] = 1000 * median(flat(times))
    dtype = str(setting.dtype_of(models[0])).removeprefix("torch.")
    device = next(net.parameters()).device.type
    threads = f"{setting.used_threads} thread{'s' * (setting.used_threads != 1)}"
    data["latency"] = f"batch {setting.batch_size}, {setting.runtime}, {dtype}, {device}, {threads}; median"


def _page(data: Mapping[str, Any]) -> bytes:
    """The page with its data; the same bytes for the same data."""
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the report holds something that JSON cannot ({error}); check the provenance and data_config"
        ) from error
    folder = files("stratavit").joinpath("reports", "page")
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    parts = {
        "title": html.escape(str(data["title"])),
        "style": read["page.css"],
        "script": "\n".join(read[name] for name in SCRIPTS),
        # ASCII that cannot end the script element that it stands in
        "data": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
    }
    return _PLACE.sub(lambda match: parts[match[1]], read["page.html"]).encode("utf-8", "replace")
