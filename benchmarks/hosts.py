"""A ViT inside a larger model, cut in place: the host's own output, uncut and at shares of the MACs, files and ONNX.

    python benchmarks/hosts.py
    python benchmarks/hosts.py --resume hosts.jsonl --only UperNet      one host; the table comes from the file

The hosts are those of the tests, small and random: the figures say that the way is sound, not how good a size is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import Journal, write_results
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hosted_models import HOSTS, OPEN_CLIP, batches_for, make

import stratavit
from stratavit.hosts.converting import host_outputs, uncut_error

ALL = HOSTS | OPEN_CLIP
SHARES = (10, 8)  # twelfths of the part's MACs
NOTE = (
    "Small random hosts (tests/hosted_models.py), 64 images. uncut: largest difference of the host's outputs with the "
    "part converted and not cut, over the largest output. n/12: squared error of the host's first output over its "
    "squared length, on 32 other inputs, at that share of the part's MACs. files: largest difference after the way "
    "back, by save_pretrained and load_transformers, or by state_dict and resize_parts. ONNX: largest difference of "
    "the exported host's first output at 8/12, run by onnxruntime, over the largest output; traced: only with "
    "dynamo=False; neither: the full host is not exported, either. open_clip's own tower is not cut in place: SuperNet "
    "makes it a model of timm, which takes its place, and which stratavit.load brings back."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--only", choices=ALL)
    options = parser.parse_args()
    journal = Journal(options.resume, "host")
    for name in ALL if options.only is None else [options.only]:
        if {"host": name} not in journal:
            journal.add(measured(name))
    if options.only is None:
        write_results("hosts", [journal.rows[name,] for name in ALL], NOTE)


def measured(name: str) -> dict[str, Any]:
    """One row."""
    hosted, host = ALL[name], make(ALL[name])
    batch, *calibration = batches_for(hosted, 3, 32)
    expected = first_output(host, batch)
    part = type(host.get_submodule(hosted.part)).__name__ if name in OPEN_CLIP else ""
    own = name == "open_clip"
    net: Any = Tower(host, calibration) if own else stratavit.convert_part(host, hosted.part, calibration)
    row = {
        "host": name,
        "part": f"{net.name} ({part or type(net.model.part).__name__})",
        "sites": f"{len(net.sites)} cut, {len(net.uncut)} uncut",
        "uncut": f"{net.uncut_error(batch) if own else uncut_error(net, batch):.1e}",
    }
    for twelfths in SHARES:
        net.place(macs=twelfths / 12, verbose=False)
        found = first_output(host, batch)
        row[f"{twelfths}/12"] = f"{float((found - expected).square().sum() / expected.square().sum()):.2%}"
    back = net.reloaded(hosted.make) if own else reloaded(host, hosted.make)
    row["files"] = f"{float((first_output(back, batch) - found).abs().max()):.1e}"
    (few,) = batches_for(hosted, 1, 2)
    row["ONNX"] = exported(host, few) or ("only the full one" if exported(net.restore(), few) else "neither")
    return row


class Tower:
    """open_clip's own image tower: `SuperNet` makes it a model of timm, and sizes of that take its place.

    Args:
        host: The model of open_clip.
        batches: To calibrate on.
    """

    name = "visual"

    def __init__(self, host: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.host, self.stock = host, host.visual
        images = [batch["image"] for batch in batches]
        self.net = stratavit.SuperNet(host.visual).contract(images).stratify(images).eval()
        self.sites, self.uncut = self.net.sites, self.net.uncut

    def place(self, **asked: Any) -> None:
        """Puts a size into the host."""
        self.host.visual = self.net.extract(**asked)

    def restore(self) -> Any:
        """The host with its own tower."""
        self.host.visual = self.stock
        return self.host

    def uncut_error(self, batch: Any) -> float:
        """Largest difference of the host's outputs with the full size in place, over the largest output."""
        expected = host_outputs(self.host, batch)
        self.place(spec={}, verbose=False)
        found = host_outputs(self.host, batch)
        self.restore()
        pairs = zip(found, expected, strict=True)
        return max(float((f - e).abs().max() / e.abs().max()) for f, e in pairs)

    def reloaded(self, build: Any) -> torch.nn.Module:
        """The host by way of files."""
        with tempfile.TemporaryDirectory() as folder:
            stratavit.save(self.host.visual, f"{folder}/tower")
            torch.save(self.host.state_dict(), f"{folder}/host.pt")
            fresh = build()
            fresh.visual = stratavit.load(f"{folder}/tower")
            fresh.load_state_dict(torch.load(f"{folder}/host.pt"))
        return fresh.eval()


def first_output(host: torch.nn.Module, batch: Any) -> Tensor:
    """Depth, logits or their like: the first floating tensor that a host returns."""
    return host_outputs(
        host, batch, lambda model, inputs: model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
    )[0]


class FirstOutput(torch.nn.Module):
    """A host as a function of its inputs, in order, for exporters."""

    def __init__(self, host: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.host, self.names = host, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The first floating tensor that the host returns."""
        found = self.host(*inputs) if len(inputs) == 1 else self.host(**dict(zip(self.names, inputs, strict=True)))
        return next(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def exported(host: torch.nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Difference of the host as an ONNX file, and how it was exported, if not by the usual exporter; or nothing."""
    model, inputs = FirstOutput(host, list(batch)).eval(), tuple(batch.values())
    with torch.no_grad():
        expected = model(*inputs)
    for dynamo in (True, False):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = f"{folder}/host.onnx"
            try:
                torch.onnx.export(model, inputs, file, dynamo=dynamo, verbose=False, input_names=list(batch))
                session = onnxruntime.InferenceSession(file)
                given = {one.name: batch[one.name].numpy() for one in session.get_inputs()}  # some become constants
                found = torch.from_numpy(session.run(None, given)[0])
            except Exception as error:  # of an exporter, whatever it does not know
                print(f"dynamo={dynamo}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                continue
        error = float((found - expected).abs().max() / expected.abs().max())
        return f"{error:.1e}" + ("" if dynamo else " (traced)")
    return ""


def reloaded(host: Any, build: Any) -> torch.nn.Module:
    """The host by way of files."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(host, "save_pretrained"):
            host.save_pretrained(folder)
            return stratavit.load_transformers(folder)
        torch.save({"sizes": stratavit.part_sizes(host), "weights": host.state_dict()}, f"{folder}/host.pt")
        kept = torch.load(f"{folder}/host.pt")
    fresh = stratavit.resize_parts(build(), kept["sizes"])
    fresh.load_state_dict(kept["weights"])
    return fresh.eval()


if __name__ == "__main__":
    main()
