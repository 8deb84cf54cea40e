"""What the command line says to twenty mistakes: what it prints, and its exit code.

    python benchmarks/cli_mistakes.py [--before SRC]

Every line runs in a process of its own, in a folder with a small super-network of random weights (``run``), a small
model (``small``), images, and a folder that is taken; a hub on this machine holds ``someone/net``. ``--before`` names
the ``src`` of another version, whose output becomes a second column.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from common import write_results
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import stratavit

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "tests"))
from fake_hub import fake_hub  # noqa: E402

MODEL, IMAGES = "deit_tiny_patch16_224", "--data images --workers 0"
LINES = (
    "extract run --macs 50 --out new",
    "extract run --params 50.0 --out new",
    f"extract run --top1 0.7 {IMAGES} --out new",
    f"extract run --max-drop 0.02 {IMAGES} --out new",
    "extract run --max-drop 2% --out new",
    "extract run --latency 0.5s --out new",
    "extract run --memory 0.2MiB --out new",
    "extract run --macs '0.8M MACs' --out new",
    "extract run --flops 50% --out new",
    f"extract run --top1 70% {IMAGES} --val-images 50 --out new",
    "extract run --macs 50% --runtime onx --out new",
    "bench run --batches 1,x",
    "evaluate run --json",
    "extract rnu --macs 50 --out taken",
    f"convert {MODEL[:-1]} --data images --out taken",
    "curve run --data imagse --out taken",
    f"extract {MODEL} --macs 50% --out new",
    f"predict timm/{MODEL}.fb_in1k images/val/ant/0.png --weights {MODEL}.safetensors --top 1",
    "extract someone/net --macs 50% --out new",
    "extract someone/absent --macs 50% --out new",
)
RUNNER = """
import json, os, shutil, sys
from stratavit.cli import bench, commands, convert, measure, parser  # once, before the processes part
for words in json.load(sys.stdin):
    shutil.rmtree("new", ignore_errors=True)
    child = os.fork()
    if child == 0:
        with open("said", "wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        code = 70
        try:
            code = parser.main(words)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, open("said", encoding="utf-8").read()]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="SRC", help="src of another version")
    args = parser.parse_args()
    trees = {"now": HERE / "src"} if args.before is None else {"before": Path(args.before), "now": HERE / "src"}
    said = {name: outputs(tree.resolve()) for name, tree in trees.items()}
    rows = [{"typed": f"`stratavit {line}`", **cells(said, number)} for number, line in enumerate(LINES)]
    note = (
        "Each line in a process of its own, on a super-network of random weights; the folder `taken` is not empty. "
        "Exit code, then all that was printed, standard error and output together. "
    )
    write_results("cli-mistakes", rows, note + ("" if args.before is None else "Before: the commit before the change."))


def cells(said: dict[str, list[tuple[int, str]]], number: int) -> dict[str, Any]:
    """What every version said to a line, in one line."""
    return {name: f"{found[number][0]}: {flat(found[number][1])}" for name, found in said.items()}


def flat(text: str) -> str:
    """Lines as one, which a table can hold."""
    return " / ".join(" ".join(line.split()) for line in text.splitlines() if line.strip()).replace("|", "\\|")


def outputs(tree: Path) -> list[tuple[int, str]]:
    """Exit code and output of every line under a version of the package."""
    with tempfile.TemporaryDirectory() as folder, fake_hub() as hub:
        work = Path(folder)
        prepare(work)
        hub.repos["someone/net"] = {file.name: file.read_bytes() for file in (work / "run").iterdir()}
        more = {"PYTHONPATH": str(tree), "HF_ENDPOINT": hub.url, "HF_HOME": str(work / "hub")}
        words = [shlex.split(line) for line in LINES]
        done = subprocess.run(
            [sys.executable, "-c", RUNNER],
            cwd=work,
            env={**os.environ, **more},
            input=json.dumps(words),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def prepare(work: Path) -> None:
    """Makes super-network, small model, images, weights of a timm model, and a folder that is taken."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=3).eval()
    batch = [(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,)))]
    net = stratavit.SuperNet(model).contract(batch).stratify(batch)
    net.save(work / "run")
    stratavit.save(net.extract(macs=0.5, verbose=False), work / "small")
    save_file(timm.create_model(MODEL).state_dict(), work / f"{MODEL}.safetensors")
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            (work / "images" / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(work / "images" / split / name / f"{number}.png")
    (work / "taken").mkdir()
    (work / "taken" / "mine.txt").write_text("keep", encoding="utf-8")


if __name__ == "__main__":
    main()
