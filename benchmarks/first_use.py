"""What a new user meets: the same lines typed under two versions, by the items of the first day, and what came of each.

    python benchmarks/first_use.py --before SRC

Every line runs in a process of its own, in a folder with a super-network of random weights (``run``), a small model
(``small``) and images of three classes; those with DeiT-Tiny's weights read `STRATAVIT_DATA`. `--before` names the
``src`` of another version, whose answers become a second column. Pages are read by Chromium. What training gives at its
defaults is measured by `finetune_small.py`, latency budgets by `latency_repeated.py`, a whole tour by `newcomer.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx
from cli_mistakes import flat
from common import DATA, MODELS, write_results
from safetensors import safe_open

HERE = Path(__file__).parents[1]
DEIT, CLASSES = DATA / MODELS["deit_tiny"][1], DATA / "imagenet" / "class_map.txt"
SIBLING = DATA / MODELS["vit_tiny_augreg"][1]
REAL = f"--data {DATA / 'imagenet'} --images 32 --workers 0"
IMAGES = "--data images --workers 0"
PREPARE = """
from pathlib import Path
import torch, stratavit
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
torch.manual_seed(0)
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=3).eval()
batch = [(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,)))]
net = stratavit.SuperNet(model).contract(batch).stratify(batch)
net.save("run")
stratavit.save(net.extract(macs=0.5), "small")
for split in ("train", "val"):
    for name in ("ant", "bee", "cat"):
        folder = Path("images") / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
"""
PASSING = re.compile(r"\d%, about|[│─━┃]|^data: .*images in .*folders|^epoch \d+ of")
LENGTH = 300  # letters of an answer that are kept, from its end


class Said(NamedTuple):
    """What a command did: exit code, all that it printed, seconds, and the folder that it ran in."""

    code: int
    text: str
    seconds: float
    folder: Path


def printed(said: Said) -> str:
    """The end of what it printed, without progress, tables and where images were found."""
    text = flat("\n".join(line for line in said.text.splitlines() if not PASSING.search(line)))
    for path, name in ((str(DATA), "DATA"), (str(said.folder), "FOLDER")):
        text = text.replace(path, name)
    return text if len(text) <= LENGTH else f"... {text[-LENGTH:]}"


def milliseconds(said: Said) -> str:
    """How long it took."""
    return f"{1000 * said.seconds:.0f} ms"


def tensors(said: Said) -> str:
    """Types and size of the weights that were written, beside what was said of them."""
    [file] = (said.folder / "half").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        kinds = {str(opened.get_tensor(key).dtype).split(".")[1] for key in opened.keys()}  # noqa: SIM118  # has no other way
    told = re.search(r"[\d.]+ MB", said.text)
    return (
        f"said {told[0] if told else 'nothing'}; {', '.join(sorted(kinds))}, {file.stat().st_size / 1e6:.3f} MB on disk"
    )


def class_names(said: Said) -> str:
    """Files beside the images that name a class."""
    files = [path for path in sorted(said.folder.glob("tuned*/*")) if path.suffix == ".json"]
    named = [path.name for path in files if '"bee"' in path.read_text(encoding="utf-8")]
    for path in said.folder.glob("tuned*.onnx"):
        data = onnx.load(path)
        named += [path.name] if any("bee" in entry.value for entry in data.metadata_props) else []
    return ", ".join(named) or "no file names a class"


def lines(said: Said) -> str:
    """Lines that it printed, not on a terminal."""
    return f"{len(said.text.splitlines())} lines; first: {said.text.splitlines()[0][:90]}"


def keys(said: Said) -> str:
    """What a JSON object holds."""
    start = said.text.find("{")
    try:
        found = json.loads(said.text[start:]) if start >= 0 else {}
    except ValueError:
        found = {}
    numbers = [f"{key} {found[key]}" for key in ("error", "macs", "macs_with_attention") if key in found]
    return "; ".join([f"keys: {', '.join(found)}" if found else printed(said), *numbers])


def times_of(said: Said) -> str:
    """MACs in the rows of `bench`."""
    try:
        rows = json.loads(said.text[said.text.index("{") :])["rows"]
    except (ValueError, KeyError):
        return printed(said)
    return "; ".join(f"{key} {row[key]}" for row in rows[:1] for key in row if "macs" in key)


def headline(said: Said) -> str:
    """What the page says at first sight, and at its slider."""
    page, browser = said.folder / "run-report.html", shutil.which("chromium")
    if browser is None or not page.exists():
        return printed(said)
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    ).stdout  # fmt: skip
    texts = [re.search(rf'id="{name}"[^>]*>(.*?)</', shown, re.S) for name in ("headline", "strip-text")]
    words = ["nothing" if text is None else flat(re.sub(r"<[^>]*>", " ", text[1])) for text in texts]
    return f"{printed(said)}; headline: {words[0]}; slider: {words[1]}"


class Case(NamedTuple):
    """A line of the table: which item of the first day, what is typed, and what is shown of it."""

    item: str
    typed: str
    show: Callable[[Said], str] = printed
    real: bool = False


CASES = (
    Case("fine-tuning", f"finetune small --new-head {IMAGES} --epochs 2 --out tuned"),
    Case("training", f"train run {IMAGES} --epochs 1 --out trained"),
    Case("wrong images", "evaluate small --data above --workers 0"),
    Case(
        "wrong weights",
        f"convert deit_tiny_patch16_224 --weights {SIBLING} {REAL} --class-map {CLASSES} --out y",
        real=True,
    ),
    Case(
        "wrong class map",
        f"convert deit_tiny_patch16_224 --weights {DEIT} {REAL} --class-map reversed.txt --out z",
        real=True,
    ),
    Case("half precision", "extract run --memory 50% --dtype float16 --out half", tensors),
    Case("class names", "export tuned", class_names),
    Case("start-up", "--help", milliseconds),
    Case("start-up", "--version", milliseconds),
    Case("start-up", "extract run --maks 50%", milliseconds),
    Case("mistyped option", "extract run --maks 50%"),
    Case("output in a log", f"curve run {IMAGES}", lines),
    Case("going on", "train --resume trained"),
    Case("help of recipe keys", "train --help"),
    Case("MACs", "extract run --macs 50% --json --out one", keys),
    Case("MACs", "bench one --json --seconds 0.1", times_of),
    Case("quick look", f"evaluate small {IMAGES} --limit 3"),
    Case("exported file", f"evaluate tuned.onnx {IMAGES}"),
    Case("several sizes", "extract run --macs 10/12,8/12 --out many"),
    Case("units", "extract run --memory 0.3MB --out unit"),
    Case("predictions", "predict tuned images/val/bee/0.png"),
    Case("mixed precision", f"evaluate small {IMAGES} --precision bf16"),
    Case("export in half", "export small --half --opset 18 --out small16.onnx"),
    Case("JSON of evaluate", f"evaluate run --macs 50% {IMAGES} --json", keys),
    Case("JSON of an error", "extract run --macs 500% --json --out none", keys),
    Case("report", "report run --overwrite", headline),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--before", metavar="SRC", help="src of another version")
    arguments.add_argument("--only", metavar="ITEM", help="cases whose item begins so")
    args = arguments.parse_args()
    cases = [case for case in CASES if case.item.startswith(args.only or "")]
    trees = {"now": HERE / "src"} if args.before is None else {"before": Path(args.before), "now": HERE / "src"}
    said = {name: answers(tree.resolve(), cases) for name, tree in trees.items()}
    rows = [
        {"item": case.item, "typed": f"`stratavit {shown(case.typed)}`"} | {name: said[name][number] for name in trees}
        for number, case in enumerate(cases)
    ]
    note = (
        "Exit code, then what came of the line. A network of random weights and images of noise, but for the lines "
        "with DATA, which read DeiT-Tiny's weights. Milliseconds: median of three, on a machine that may be busy."
    )
    write_results("first-use", rows, note + ("" if args.before is None else " Before: commit 448e28a."))


def shown(typed: str) -> str:
    """A line without folders of this machine."""
    return typed.replace(str(DATA), "DATA")


def answers(tree: Path, cases: list[Case]) -> list[str]:
    """What comes of every line under a version of the package."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, "-c", PREPARE], cwd=work, env=environment, check=True)
        shutil.copytree(work / "images", work / "above" / "images")
        names = CLASSES.read_text(encoding="utf-8").split() if CLASSES.exists() else []
        (work / "reversed.txt").write_text("\n".join(reversed(names)), encoding="utf-8")
        found = []
        for case in cases:
            said = run(tree, work, case)
            try:
                answer = case.show(said) if said.code in (0, 2) else printed(said)
            except (OSError, ValueError, LookupError) as error:  # what the other version did not write
                answer = f"{printed(said)} ({type(error).__name__})"
            found.append(f"{said.code}: {answer}")
            print(f"{case.item} | {shown(case.typed)} | {found[-1]}", flush=True)
        return found


def run(tree: Path, work: Path, case: Case) -> Said:
    """Types a line; three times if it is timed."""
    command = [sys.executable, "-m", "stratavit", *shlex.split(case.typed)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "160"}
    seconds = []
    for _ in range(3 if case.show is milliseconds else 1):
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        seconds.append(time.perf_counter() - started)
    return Said(done.returncode, done.stdout, statistics.median(seconds), work)


if __name__ == "__main__":
    main()
