"""What the benchmarks share: real models and images, and dated result files."""

from __future__ import annotations

import csv
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import stratavit
from stratavit.artifacts.model_loading import dense_model
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.allocation import allocate
from stratavit.elastic.compensation import Moments
from stratavit.models.architecture import resolve_data_config

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent / "work"  # where converted models are kept
DATA = Path(os.environ.get("STRATAVIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", "deit_tiny_patch16_224.safetensors"),
    "vit_tiny_augreg": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg.safetensors"),
}
Batches = list[tuple[Tensor, Tensor]]


def real_model(name: str) -> nn.Module:
    """A real pre-trained model of the development data."""
    architecture, weights = MODELS[name]
    if not (DATA / weights).exists():
        sys.exit(f"{DATA / weights} is missing: benchmarks/README.md says what STRATAVIT_DATA should hold")
    return dense_model(architecture, DATA / weights)


def real_batches(model: nn.Module, split: str, limit: int | None = None, batch_size: int = 50) -> Batches:
    """Images of a split, held in memory, prepared as a model or a super-network needs them."""
    folder = DATA / "imagenet"
    config = getattr(model, "data_config", None) or resolve_data_config(model)
    return list(image_loader(folder, config, split, 1000, folder / "class_map.txt", batch_size, limit=limit))


def converted(name: str, work: Path, whole_heads: bool = False, **options: Any) -> stratavit.SuperNet:
    """A real model's super-network, from 1,000 training images; kept in a folder of `work`."""
    words = [word for value in options.values() for word in ([value] if isinstance(value, str) else value)]
    words += ["whole_heads"] * whole_heads
    folder = work / "-".join([name, *words])
    if not folder.exists():
        model = real_model(name)
        images = real_batches(model, "train", 1000)
        net = stratavit.SuperNet(model, whole_heads=whole_heads).contract(images)
        net.stratify(images, **options).save(folder)
    return stratavit.SuperNet.load(folder)


@torch.inference_mode()
def correct(net: stratavit.SuperNet, spec: stratavit.Spec, batches: Batches) -> Tensor:
    """1 for each image whose class is the first answer, else 0."""
    net.eval()
    return torch.cat([(net(images, spec).argmax(dim=-1) == labels).float() for images, labels in batches])


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes."""
    start = clock()
    run()
    return clock() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeat: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            seconds[name].append(timed(run, clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def noise(images: int, batch_size: int) -> Batches:
    """Random images of 224 pixels in batches."""
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    return [(torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))) for size in sizes]


def even(net: stratavit.SuperNet, share: float) -> stratavit.Spec:
    """Every site at the same ratio, a share of the MACs."""
    full = dict(net.resolve(None))
    return stratavit.Spec(allocate(net.cost, dict.fromkeys(full, 0.0), share, full))


def plain(model: nn.Module, batches: Batches) -> None:
    """What a user would run to get gradients: forward and backward through everything."""
    for images, labels in batches:
        model(images).gather(1, labels[:, None]).sum().backward()
        model.zero_grad(set_to_none=True)


def peak() -> int:
    """Largest resident set of this process so far, KiB (Linux; getrusage would count the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise SystemExit("no /proc/self/status: this measurement needs Linux")


def grown(run: Callable[[], object]) -> int:
    """By how much a call raises this process's largest resident set, KiB."""
    before = peak()
    run()
    return peak() - before


def anew(*words: str) -> str:
    """The last word that the running script prints in a fresh process, with other arguments."""
    command = [sys.executable, sys.argv[0], *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, forked from this one, which saves the imports."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def as_if_contracted(model: nn.Module, crossed: bool = False) -> stratavit.SuperNet:
    """A super-network with moments that are made up: neither time nor memory depends on the numbers.

    Args:
        model: Its source.
        crossed: With the moments of either fold, too, as `contract` leaves them for `stratify`.
    """
    net = stratavit.SuperNet(model)
    for module in net.elastic.values():
        made = []
        for _ in range(3 if crossed else 1):
            n = module.heads * module.full_width
            factor = torch.eye(n) + 0.01 * torch.randn(n, n).tril()
            made.append((torch.zeros(module.heads, module.full_width), Moments(factor, 1e-3, 1.0)))
        (module.channel_mean, module.moments), *folds = made
        module.crossed = tuple((mean, moments.packed()) for mean, moments in folds)
    return net


class Journal:
    """Rows of a table in a file, one JSON object a line: an interrupted run goes on from it.

    Args:
        path: The file, made at the first row; None keeps nothing.
        key: Columns that tell rows apart.

    Attributes:
        rows: Those of the file and those that were added, by the values of the key.
    """

    def __init__(self, path: Path | None, *key: str) -> None:
        self.path, self.key = path, key
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.rows = {self._of(row): row for row in map(json.loads, lines)}

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._of(row) in self.rows

    def add(self, row: Mapping[str, Any]) -> None:
        """Prints a row and appends it to the file."""
        print(row, flush=True)
        self.rows[self._of(row)] = dict(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def write_results(name: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Prints a table and writes it, dated, as CSV and Markdown with command, versions and hardware."""
    stem = f"{datetime.date.today().isoformat()}-{name}"
    RESULTS.mkdir(exist_ok=True)
    columns = list(rows[0])
    with (RESULTS / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    words = [Path(word).name.upper() if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *words])
    facts = (
        f"`{command}`; stratavit {stratavit.__version__}, timm {timm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, {_processor()}"
    )
    text = "\n".join([f"# {name}, {datetime.date.today().isoformat()}", "", *lines, "", note, "", facts, ""])
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, title: str, best: str = "", first: str = "-"
) -> None:
    """Top-1 against the share of the MACs, a line each.

    Args:
        lines: Label -> points (share, top-1), largest first.
        path: PNG to write.
        title: Of the picture.
        best: Label of the line that stands out; the last one if empty.
        first: Style of the first line, in grey.
    """
    figure = Figure(figsize=(7.5 + 2.5 * (len(lines) > 8), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines.items()):
        shades = {next(iter(lines)): ("#9ca3af", first), best or list(lines)[-1]: ("#2563eb", "-")}
        colour, style = shades.get(label, (f"C{number}", "-"))
        width = 2.2 if label in shades else 1.1
        axes.plot(
            *zip(*points, strict=True), style, marker="o", markersize=4, color=colour, linewidth=width, label=label
        )
    axes.set(xlabel="share of the dense model's MACs", ylabel="top-1, %", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > 8 else {}
    axes.legend(fontsize=7, frameon=False, **beside)
    figure.savefig(path, dpi=150)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
