"""What does int8 cost and gain on top of a smaller model? Sizes of DeiT-Tiny in five runtimes and types, on the CPU.

    python benchmarks/quantised.py [--validation 50 --seconds 0.2]

Float32: PyTorch, ONNX Runtime, OpenVINO. Int8: ONNX Runtime and OpenVINO as `stratavit export --int8` writes them,
calibrated on training images; torchao's dynamic and weight-only int8, eager. Needs `pip install '.[openvino]' torchao`.
All are timed in turns, one batch each, so that a busy machine slows all alike; ratios are to PyTorch in float32.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import WORK, Batches, converted, interleaved, real_batches, write_results
from torch import Tensor, nn

import stratavit
from stratavit.choices import CALIBRATED
from stratavit.interop.onnx_file import INPUT, onnx_session
from stratavit.interop.openvino_file import FILE, compiled, read_openvino

TWELFTHS = (12, 8, 6)
BATCHES = (1, 16)
WARM_UP = 2
Run = Callable[[Tensor], Any]  # images to logits, a tensor or an array
Entry = tuple[Run, int]  # and the bytes of its file


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=WORK, help="folder where the converted model is kept")
    arguments.add_argument("--axes", choices=("width", "both"), default="width", help="both: merge tokens, too")
    arguments.add_argument("--validation", type=int, help="validation images (default: all)")
    arguments.add_argument("--calibration", type=int, default=CALIBRATED, help="training images (default: %(default)s)")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each runtime")
    arguments.add_argument("--seconds", type=float, default=10.0, help="of timing, per runtime, size and batch")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    net = converted("deit_tiny", args.work, axes=("width", "tokens"))
    batches = real_batches(net, "val", args.validation, 25)
    images = torch.cat([part for part, _ in real_batches(net, "train", args.calibration)])
    rows = []
    for twelfths in TWELFTHS:
        model = net.extract(spec={} if twelfths == 12 else net.spec(macs=twelfths / 12, axes=args.axes)).eval()
        with tempfile.TemporaryDirectory() as folder:
            found = entries(model, Path(folder), images, args.threads)
            with torch.inference_mode():
                rows += measured(f"{twelfths}/12", found, batches, args.seconds)
    count = sum(len(labels) for _, labels in batches)
    note = (
        f"Top-1 and agreement (same first class as PyTorch in float32) on {count} validation images; int8 files "
        f"calibrated on {len(images)} training images. {args.threads} threads, processor {vnni()}; median milliseconds "
        "per batch. OpenVINO's float32 is asked for (its own choice may be bfloat16). torchao in eager mode."
    )
    write_results("quantised" if args.axes == "width" else "quantised-tokens", rows, note)


def entries(model: nn.Module, folder: Path, images: Tensor, threads: int) -> dict[str, Entry]:
    """Runtime and type -> how it is run, and the size of its file."""
    found: dict[str, Entry] = {"PyTorch float32": (model, saved_bytes(model))}
    for int8, kind in ((False, "float32"), (True, "int8")):
        for format, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            path = folder / f"{kind}-{name}{'.onnx' if format == 'onnx' else ''}"
            shown = images if int8 else images[:32]
            parity = stratavit.export(model, path, format, shown, int8=int8, min_agreement=0 if int8 else None)
            print(parity, flush=True)
            found[f"{name} {kind}"] = (onnx_run if format == "onnx" else openvino_run)(path, threads), parity.size
    return found | torchao(model)


def torchao(model: nn.Module) -> dict[str, Entry]:
    """The same for torchao, whose int8 is of PyTorch modules."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    found = {}
    for name, config in (("dynamic", Int8DynamicActivationInt8WeightConfig()), ("weights", Int8WeightOnlyConfig())):
        made = copy.deepcopy(model)
        quantize_(made, config)
        found[f"torchao int8 {name}"] = made, saved_bytes(made)
    return found


def saved_bytes(model: nn.Module) -> int:
    """Of its state dict, saved."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return len(content.getbuffer())


def onnx_run(path: Path, threads: int) -> Run:
    session = onnx_session(path, threads)
    return lambda images: session.run(None, {INPUT: images.numpy()})[0]


def openvino_run(path: Path, threads: int) -> Run:
    model = compiled(read_openvino(path / FILE), threads)
    return lambda images: model(images.numpy())[0]


def measured(size: str, found: dict[str, Entry], batches: Batches, seconds: float) -> list[dict[str, Any]]:
    """One row for every runtime: accuracy, then times in turns."""
    labels = torch.cat([part for _, part in batches])
    classes = {name: first_classes(run, batches) for name, (run, _) in found.items()}
    reference = classes["PyTorch float32"]
    rows = [
        {
            "MACs": size,
            "runtime": name,
            "top-1": 100 * float((classes[name] == labels).float().mean()),
            "agreement": 100 * float((classes[name] == reference).float().mean()),
            "MB": found[name][1] / 1e6,
        }
        for name in found
    ]
    images = torch.cat([part for part, _ in batches])
    for batch in BATCHES:
        some = images[:batch].contiguous()
        runs = {name: partial(run, some) for name, (run, _) in found.items()}
        times = interleaved(runs, turns(runs, seconds))
        for row in rows:
            row[f"ms, batch {batch}"] = 1e3 * times[row["runtime"]]
            row[f"speed-up, batch {batch}"] = times["PyTorch float32"] / times[row["runtime"]]
    return rows


def first_classes(run: Run, batches: Batches) -> Tensor:
    """The first class of every image."""
    return torch.cat([torch.as_tensor(run(images)).argmax(-1) for images, _ in batches])


def turns(runs: dict[str, Callable[[], Any]], seconds: float) -> int:
    """How many turns take so many seconds for each run, after a few to warm up."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    start = time.perf_counter()
    for run in runs.values():
        run()
    return max(3, int(len(runs) * seconds / (time.perf_counter() - start)))


def vnni() -> str:
    """Whether the processor has instructions for products of int8."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return "with VNNI instructions" if "vnni" in text else "without VNNI instructions, as far as is known"


if __name__ == "__main__":
    main()
