"""What a user does first, with the package as installed and nothing but its core dependencies.

`make release` copies this file away from the source tree and runs it in an environment of the wheel's own:
`python -I smoke.py`. It writes to the working folder, and its last line says what held; any other end is a failure.
"""

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from PIL import Image

import stratavit

EXTRAS = (
    "sklearn",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "accelerate",
    "tensorboard",
    "transformers",
    "lightning",
    "datasets",
    "openvino",
)
COMMANDS = ("convert", "extract", "evaluate", "curve", "report", "export", "bench", "train", "finetune", "info", "demo")


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`stratavit` as a shell finds it in this environment."""
    program = Path(sys.executable).with_name("stratavit")
    return subprocess.run([str(program), *arguments], capture_output=True, text=True)


def installed() -> None:
    """The package lies in this environment and alone: no source tree, no extra."""
    place = Path(stratavit.__file__).resolve()
    assert place.is_relative_to(Path(sysconfig.get_path("purelib")).resolve()), f"imported from {place}"
    assert not (found := [name for name in EXTRAS if find_spec(name)]), f"extras are installed: {found}"
    assert stratavit.__version__ == version("stratavit")
    assert (place.parent / "py.typed").is_file(), "users' type checkers do not see the types"


def answers() -> None:
    """The program says what it is."""
    said = command("--version")
    assert (said.returncode, said.stdout.strip()) == (0, f"stratavit {version('stratavit')}"), said
    said = command("--help")
    assert said.returncode == 0, said.stderr
    assert all(f"    {name} " in said.stdout for name in COMMANDS), said.stdout


def works() -> None:
    """Contract, stratify, extract, save, load, compare; then the same folders from the command line."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    ).eval()
    loader = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))]
    images = torch.randn(4, 3, 32, 32)
    net = stratavit.SuperNet(model).contract(loader).stratify(loader)
    small = net.extract(macs=0.5, verbose=False)
    net.save("run")
    stratavit.save(small, "small")
    loaded = stratavit.load("small")
    again = stratavit.SuperNet.load("run").extract(macs=0.5, verbose=False)
    with torch.no_grad():
        assert torch.allclose(net(images), model(images), atol=1e-4), "contraction changed the function"
        assert torch.equal(loaded(images), small(images)), "the loaded model is another one"
        assert torch.allclose(again(images), small(images), atol=1e-5), "the loaded super-network is another one"
    stratavit.write_report(net, "page.html", [])
    page = Path("page.html").read_text(encoding="utf-8")
    parts = [*(Path(stratavit.__file__).parent / "reports" / "page").glob("*.[cj]s*")]
    assert len(parts) > 3
    assert all(part.read_text(encoding="utf-8").strip() in page for part in parts), "the report lacks files of its own"
    for name in ("run", "small"):
        told = command("info", name, "--json")
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["macs"] > 0


def tells() -> None:
    """What needs an extra says so in one line that names it, and leaves nothing behind."""
    for split in ("train", "val"):
        for label in range(10):
            folder = Path("images", split, f"class{label}")
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label, 0, 0)).save(folder / "0.png")
    foreign = Path("foreign")
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    (foreign / "model.safetensors").write_bytes(Path("small", "model.safetensors").read_bytes())
    data = ("--data", "images", "--workers", "0", "--device", "cpu")
    for extra, asked in (
        ("demo", ("demo", "--out", "out")),
        ("export", ("export", "small", "--out", "out")),
        ("export", ("bench", "small", "--runtimes", "onnx", "--batches", "1", "--device", "cpu")),
        ("train", ("train", "run", *data, "--out", "out")),
        ("train", ("finetune", "small", *data, "--out", "out")),
        ("transformers", ("convert", "foreign", "--data", "images", "--workers", "0", "--out", "out")),
    ):
        before = sorted(Path().rglob("*"))
        told = command(*asked)
        lines = [line for line in told.stderr.strip().splitlines() if not line.startswith("data: ")]
        assert told.returncode == 2, (asked, told)
        assert len(lines) == 1, (asked, told.stderr)
        assert f"pip install 'stratavit[{extra}]'" in lines[0], (asked, told.stderr)
        assert sorted(Path().rglob("*")) == before, f"{asked} left something behind"
        print(lines[0])


if __name__ == "__main__":
    installed()
    answers()
    works()
    tells()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy"))
    print(f"all well with Python {sys.version.split()[0]}, {packages}")
