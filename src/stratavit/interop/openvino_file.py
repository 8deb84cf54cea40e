"""Models in OpenVINO's format, made from ONNX files and run on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from stratavit.errors import StrataViTError
from stratavit.interop.onnx_file import Runner

FILE = "openvino_model.xml"  # in a folder, with its weights in openvino_model.bin; Optimum calls them so
SECTION = "stratavit"  # of what a file says of itself


def write_openvino(source: Path, folder: Path) -> None:
    """Converts an ONNX file, in float32 or int8, with its metadata.

    Args:
        source: A file of `write_onnx` or `quantise`.
        folder: Where to write; made.

    Raises:
        StrataViTError: Packages are missing.
    """
    import onnx

    openvino, model = openvino_package(), read_openvino(source)  # `convert_model` would start its telemetry, too
    for one in onnx.load(source).metadata_props:
        model.set_rt_info(one.value, [SECTION, one.key])
    folder.mkdir()
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def read_openvino(path: Path) -> Any:
    """OpenVINO's model of a file."""
    return _core().read_model(path)


def compiled(model: Any, threads: int = 0) -> Any:
    """OpenVINO's model ready to run on the CPU, in float32 where it is not int8.

    On CPUs that have bfloat16, OpenVINO's own choice for float32 is that.

    Args:
        model: See `read_openvino`.
        threads: 0 is what OpenVINO chooses itself.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return _core().compile_model(model, "CPU", settings)


def run_openvino(folder: Path) -> Runner:
    """What maps images ``[B, C, H, W]`` to the outputs of a folder of `write_openvino`."""
    model = compiled(read_openvino(folder / FILE))
    return lambda images: torch.from_numpy(model(images.numpy())[0].copy())  # OpenVINO writes to one place


@functools.cache
def _core() -> Any:
    """OpenVINO's devices, one for the process: each would change the stack of signal handlers, and change it back.

    If several end in another order than the reverse of how they began, a signal ends the process (OpenVINO 2026.4).
    """
    return openvino_package().Core()


def openvino_package() -> Any:
    """The package; a StrataViTError if it is missing."""
    try:
        import openvino
    except ImportError as error:
        raise StrataViTError("OpenVINO needs one more package: pip install 'stratavit[openvino]'") from error
    return openvino
