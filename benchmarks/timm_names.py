"""How many of timm's transformers can be cut: every name is built, cut and run.

    python benchmarks/timm_names.py [NAMES] [--limit N] [--resume] [--before SRC]

The names are all those of `MODULES`, the modules of timm in which every model is a transformer: tokens that attend to
each other. Convolutional networks with attention in some stages (MobileViT, EdgeNeXt, EfficientViT, NextViT, ...) are
not among them. The rule does not depend on what StrataViT supports.

A name counts if a model of random weights becomes a super-network, which has its outputs at full width, and if the
small model with about 60 % of every module's channels has those of the super-network. A model is built for the
smallest image that it accepts, and a large one with few blocks; the table of names says so. Each name is a line of the
journal, from which ``--resume`` goes on. With a pattern or a limit the table is printed, not written. `--before` names
the ``src`` of another version, which is tried on the same names.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import list_models
from torch import nn

HERE = Path(__file__).parents[1]
MODULES = (
    *("beit", "cait", "coat", "convit", "crossvit", "davit", "deepseek_vit", "deit", "efficientformer"),
    *("efficientformer_v2", "eva", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "levit", "maxxvit", "mvitv2"),
    *("naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit", "swin_transformer", "swin_transformer_v2"),
    *("swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "vision_transformer", "vision_transformer_hybrid"),
    *("vision_transformer_relpos", "vision_transformer_sam", "visformer", "vitamin", "volo", "xcit"),
)
SIDES = (64, 96, 128, 224)  # of images, smallest first; then the model's own
SHALLOW: tuple[dict[str, Any], ...] = (  # arguments that leave few blocks
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 2)},
    {"depth": 1},
)
SMALL, LARGEST = 30e6, 700e6  # parameters: above the first with few blocks, above the second not at all
KEPT, TOLERANCE = 0.6, 1e-4


def names() -> Iterator[tuple[str, str]]:
    """Module and name of every model of `MODULES` that this version of timm has."""
    for module in MODULES:
        yield from ((module, name) for name in list_models(module=module))


def forms(name: str) -> Iterator[dict[str, Any]]:
    """Arguments that may build a cheap model, cheapest first; the last ones are none at all."""
    shallow: list[dict[str, Any]] = [{}]
    if parameters(name, {}) > SMALL:
        shallow = [more for more in SHALLOW if parameters(name, more) < parameters(name, {})] + shallow
    for more in shallow:
        if parameters(name, more) <= LARGEST:
            yield from ({**more, "img_size": side} for side in SIDES)
            yield more


def parameters(name: str, more: dict[str, Any]) -> float:
    """Number of parameters, without storage; infinite where timm does not build it so."""
    try:
        return sum(p.numel() for p in timm.create_model(name, device="meta", **more).parameters())
    except Exception:
        return float("inf")


def built(name: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """A model with lively weights, an image for it, and the arguments that it was built with."""
    for more in forms(name):
        try:
            torch.manual_seed(0)
            model = lively(timm.create_model(name, **more).eval())
            side = more.get("img_size") or model.pretrained_cfg["input_size"][-1]
            images = torch.randn(2, 3, side, side)
            with torch.no_grad():
                model(images)
        except Exception:  # whatever timm says to a size that does not fit
            continue
        return model, images, more
    raise ValueError(f"more than {LARGEST / 1e6:.0f} million parameters, and no form with fewer blocks")


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """The model with noise in vectors that start as zeros or as small constants (gains, biases, LayerScale)."""
    for parameter in model.parameters():
        if parameter.numel() and float(parameter.std() if parameter.numel() > 1 else 0) == 0:
            gain = 1.0 if float(parameter.flatten()[0]) != 0 else 0.0
            parameter.copy_(gain + 0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def tried(name: str) -> dict[str, Any]:
    """What becomes of a name, as plain data."""
    import stratavit

    row: dict[str, Any] = {"form": "", "converts": False, "attention": 0, "mlp": 0, "uncut": 0, "reason": ""}
    try:
        model, images, more = built(name)
        row["form"] = " ".join(f"{key}={value}" for key, value in more.items()).replace(", ", ",")
        net = stratavit.SuperNet(model).eval()
        kinds = [site.kind for site in net.sites]
        row |= {"attention": kinds.count("attention"), "mlp": kinds.count("mlp"), "uncut": len(net.uncut)}
        spec = {site.name: max(1, round(KEPT * site.width)) for site in net.sites}
        whole, cut = net(images), net(images, spec)
        small = net.extract(spec=spec, verbose=False)
        for what, ours, theirs in (("full width", whole, model(images)), ("small model", small(images), cut)):
            apart = float((ours - theirs).abs().max() / theirs.abs().max())
            if not apart <= TOLERANCE:
                raise ValueError(f"{what}: outputs differ by {apart:.1e}")
        row["converts"] = True
    except Exception as error:  # a refusal is what is counted, and so is a fault
        row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return row


class Tree:
    """A process with the package of a source tree, which tries one name after another."""

    def __init__(self, source: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(source)}
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tried(self, name: str) -> dict[str, Any]:
        """See `tried`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def work() -> None:
    """Tries the names on standard input; each in a process of its own, whose memory is free afterwards."""
    import stratavit  # noqa: F401  before the processes part

    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(tried, line.strip()).result()
        except Exception as error:  # killed for its memory
            row = {"form": "", "converts": False, "attention": 0, "mlp": 0, "uncut": 0, "reason": f"killed: {error}"}
        print(json.dumps(row), flush=True)


def main() -> None:
    """Tries names, and counts them by module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="?", default="*", metavar="NAMES", help="pattern of names, such as 'samvit*'")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many names of a module")
    parser.add_argument("--resume", action="store_true", help="go on from the journal")
    parser.add_argument("--journal", type=Path, default=Path(__file__).parent / "work" / "timm_names.jsonl")
    parser.add_argument("--before", type=Path, metavar="SRC", help="src of another version")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    from common import Journal, write_results

    if not args.resume:
        args.journal.unlink(missing_ok=True)
    sources = {"now": HERE / "src"} if args.before is None else {"before": args.before, "now": HERE / "src"}
    trees = {version: Tree(source) for version, source in sources.items()}
    journal, rows, seen = Journal(args.journal, "version", "name"), [], dict.fromkeys(MODULES, 0)
    for module, name in names():
        seen[module] += fnmatch.fnmatch(name, args.names)
        if not fnmatch.fnmatch(name, args.names) or (args.limit is not None and seen[module] > args.limit):
            continue
        for version, tree in trees.items():
            if {"version": version, "name": name} not in journal:
                journal.add({"version": version, "module": module, "name": name, **tree.tried(name)})
            rows.append(journal.rows[version, name])
    if args.names == "*" and args.limit is None:
        write_results("timm-names", counts(rows, list(trees)), note(rows))
    else:
        print(*counts(rows, list(trees)), sep="\n")


def counts(rows: list[dict[str, Any]], versions: list[str]) -> list[dict[str, Any]]:
    """Names, and those that convert, by module and in all."""
    groups = {module: [row for row in rows if row["module"] == module] for module in MODULES}
    groups = {module: found for module, found in groups.items() if found} | {"all": rows}
    table = []
    for module, found in groups.items():
        converts = {version: [row for row in found if row["version"] == version] for version in versions}
        reasons = {row["reason"].partition(": ")[2] for row in converts["now"] if not row["converts"]}
        reasons = {reason.partition(": expected a timm model")[0] for reason in reasons}
        table.append(
            {"module": module, "names": len(converts["now"])}
            | {f"convert, {version}": sum(row["converts"] for row in found) for version, found in converts.items()}
            | {"first reason": min(reasons, default="") if module != "all" else ""}
        )
    return table


def note(rows: list[dict[str, Any]]) -> str:
    """What the table means."""
    few = sum("depth" in row["form"] or "layers" in row["form"] for row in rows if row["version"] == "now")
    return (
        "Random weights, the smallest image that a model accepts. A name converts if the super-network has the model's "
        f"outputs and the small model, with {KEPT:.0%} of every module's channels, has the super-network's (to "
        f"{TOLERANCE:g} of the largest). {few} names were tried with few blocks."
    )


if __name__ == "__main__":
    main()
