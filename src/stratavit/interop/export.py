"""Small models in other forms, checked against eager before they are kept: ONNX, OpenVINO, torch.export and others."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stratavit.choices import FOLDERS, INT8_FORMATS, MIN_AGREEMENT
from stratavit.choices import SUFFIXES as SUFFIXES
from stratavit.choices import Format as Format
from stratavit.data.batches import check_finite, check_images, unpack
from stratavit.errors import StrataViTError
from stratavit.files.atomic import followed, move_into_place, temporary_sibling
from stratavit.files.folders import check_free, check_free_file
from stratavit.interop.libraries import as_timm
from stratavit.interop.onnx_file import FREE_BATCH, Runner, metadata_of, run_onnx, without_their_warnings, write_onnx
from stratavit.interop.openvino_file import openvino_package, run_openvino, write_openvino
from stratavit.interop.parity import TOLERANCE, Parity, compared
from stratavit.interop.quantised import BATCH, quantise
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.interop.transformers.folders import load_transformers, save_transformers
from stratavit.models.architecture import resolve_data_config
from stratavit.models.number_types import HALF_TOLERANCE, InHalf
from stratavit.utils.agreement import agreement
from stratavit.utils.model import classes_of, eval_mode, is_super_network, model_device, model_dtype
from stratavit.utils.wrappers import unwrapped

NOISE_IMAGES = 8
METADATA = "stratavit.json"  # what a program of torch.export holds `metadata_of` under


@dataclass(frozen=True)
class _Task:
    """What is written, and on what it is compared."""

    path: Path
    format: Format
    images: Tensor
    tolerance: float
    opset: int | None
    int8: bool
    least: float  # percent of agreement


def export(
    model: nn.Module,
    path: str | Path,
    format: Format = "onnx",
    images: Tensor | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
    half: bool = False,
    opset: int | None = None,
    int8: bool = False,
    min_agreement: float | None = None,
) -> Parity:
    """Writes a model to one file that needs neither this library nor timm; the batch size is free.

    The file is read back and run (ONNX Runtime, OpenVINO, or `torch.export.load`) on the images, one batch and one
    image alone, and kept only if its outputs are the model's. The folder that ``transformers`` writes by
    ``save_pretrained`` is compared on the batch; `load_transformers` reads it.

    With `int8`, linear layers are quantised (weights per channel, inputs by ranges measured on the images), the rest
    stays in float32; the file is kept if it agrees with the model on enough of the images.

    Args:
        model: What `SuperNet.extract` or `load` returned, in float32; exported as in eval mode, on the CPU.
        path: File to write; a folder for ``openvino`` and ``transformers``.
        format: ``onnx``, by torch's own exporter (torch.export), ``openvino``, made from ONNX, ``torch``, a program
            for `torch.export.load`, or ``transformers``, for models that came from there.
        images: To compare on, ``[B, C, H, W]``, prepared for the model; noise if None. `int8` is calibrated on them.
        overwrite: Replace the file if it is there.
        tolerance: Largest difference of a logit that passes, as a share of the largest logit of its image (and
            `parity.FLOOR` more), so that logits of any scale are judged alike; with `half` at least `HALF_TOLERANCE`.
            With `int8`, of the float32 file that is quantised.
        half: Weights and arithmetic in float16; images and logits stay in float32. For ``onnx`` and ``torch``.
        opset: Version of ONNX operators, for ``onnx``; torch's choice if None.
        int8: Quantise, for ``onnx`` and ``openvino``.
        min_agreement: Of an int8 file, percent; 0 accepts any. See `Parity.agreement`; 90 if None.

    Returns:
        Where it was written, its size in bytes, and by how much its outputs differ from the model's.

    Raises:
        StrataViTError: Not a small model in float32, an unknown format, options that it does not have, images that do
            not fit the model, packages are missing, or the outputs of the file differ from the model's; then nothing
            is left.
        ArtifactError: The file exists or cannot be written.
    """
    check_options(format, half, opset, int8, min_agreement)
    model = unwrapped(model)
    if is_super_network(model):
        raise StrataViTError("export: a super-network has many sizes; extract one first")
    if model_dtype(model) is not torch.float32:
        raise StrataViTError(f"export: the model is in {model_dtype(model)}; call model.float() first")
    model, path = as_timm(model), Path(path)
    check_target(path, format, overwrite)
    if format == "transformers" and not getattr(model, "origin", None):
        raise StrataViTError("export: format transformers is for models that came from there; this one is timm's")
    images = _images(model, images, int8)
    device = model_device(model)
    least = MIN_AGREEMENT if min_agreement is None else min_agreement
    try:
        with eval_mode(model), torch.no_grad():
            written = InHalf(model.cpu()).eval() if half else model.cpu()
            tolerance = max(tolerance, HALF_TOLERANCE) if half else tolerance
            return _kept(model, written, _Task(path, format, images, tolerance, opset, int8, least), overwrite)
    finally:
        model.to(device)


def check_options(
    format: Format, half: bool = False, opset: int | None = None, int8: bool = False, min_agreement: float | None = None
) -> None:
    """Checks what `export` is asked for, before any work.

    Raises:
        StrataViTError: An unknown format, options that it does not have or that exclude each other.
    """
    if format not in SUFFIXES:
        raise StrataViTError(f"export: expected a format of {', '.join(SUFFIXES)}, got {format!r}")
    if half and format in FOLDERS:
        raise StrataViTError(f"export: half is for onnx and torch, and the format is {format}; leave it out")
    if opset is not None and format != "onnx":
        raise StrataViTError(f"export: opset is a version of ONNX operators, and the format is {format}; leave it out")
    if int8 and format not in INT8_FORMATS:
        raise StrataViTError(f"export: int8 is for {' and '.join(INT8_FORMATS)}, and the format is {format}")
    if int8 and half:
        raise StrataViTError("export: int8 and half are two ways to make a file smaller; ask for one of them")
    if min_agreement is not None and not int8:
        raise StrataViTError("export: min_agreement is the bound of int8 files; leave it out, or ask for int8, too")
    if min_agreement is not None and not 0 <= min_agreement <= 100:
        raise StrataViTError(f"export: min_agreement = {min_agreement:g}, expected a percentage, 0 to 100")
    if format == "openvino":
        openvino_package()


def check_target(path: str | Path, format: Format, overwrite: bool) -> None:
    """Checks that a file of this format, or a folder where it is one, may be written.

    Raises:
        ArtifactError: There is one already, or it cannot be written.
        StrataViTError: Its name ends like something else.
    """
    (check_free if format in FOLDERS else check_free_file)(path, overwrite)
    ending = Path(path).suffix.lower()
    if format in FOLDERS:
        wanted, fits = "a folder", ending not in SUFFIXES.values()
    else:  # a number is of a size or a version
        wanted, fits = (
            f"a file that ends in {SUFFIXES[format]}",
            ending in ("", SUFFIXES[format]) or ending[1:].isdigit(),
        )
    if not fits:
        raise StrataViTError(
            f"export: format {format} is {wanted}, got {str(path)!r}; give another name, or its format"
        )


def _images(model: nn.Module, images: Tensor | None, int8: bool) -> Tensor:
    """What to compare on, checked, in float32 on the CPU."""
    if images is None and int8:
        raise StrataViTError("export: int8 is calibrated on images; give images=, some hundreds like those it will see")
    if images is None:
        size = resolve_data_config(model)["input_size"]
        images = torch.randn(NOISE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    images, _ = unpack((images,), "export")
    check_images(model, images, "export")
    check_finite(images, "export")
    if not len(images):
        raise StrataViTError("export: there are no images to compare on; give at least one, or leave images out")
    return images.float().cpu()


def _kept(model: nn.Module, written: nn.Module, task: _Task, overwrite: bool) -> Parity:
    """Writes next to the path, compares with the model, moves it there."""
    target = followed(task.path)
    with temporary_sibling(target) as place:
        # torch asks for its own suffix
        new = place if task.format in FOLDERS else place.with_suffix(SUFFIXES[task.format])
        parity = _quantised(model, new, task) if task.int8 else _exact(model, written, new, task)
        move_into_place(new, target, overwrite)
    return parity


def _exact(model: nn.Module, written: nn.Module, new: Path, task: _Task) -> Parity:
    """Writes a file that must compute what the model does."""
    writers: dict[Format, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Runner]]] = {
        "onnx": (lambda model, example, path: write_onnx(model, example, path, task.opset), run_onnx),
        "openvino": (_to_openvino, run_openvino),
        "torch": (_to_program, _run_program),
        "transformers": (_to_folder, _run_folder),
    }
    write, run = writers[task.format]
    write(written, _example(task.images), new)
    # what is eager has no fixed size
    batches = [task.images] if task.format == "transformers" else [task.images, task.images[:1]]
    expected, exported = model(task.images), run(new)
    difference, tied = compared(exported, model, expected, batches, task.format, task.tolerance)
    largest, count = float(expected.abs().max()), len(task.images) - tied
    return Parity(str(task.path), task.format, _size(new), count, difference, largest, tied=tied)


def _quantised(model: nn.Module, new: Path, task: _Task) -> Parity:
    """Writes a file in int8, which must agree with the model on most images."""
    source = new.with_name("float32.onnx")
    write_onnx(model, _example(task.images), source, task.opset)
    batches = task.images.split(BATCH)
    expected = torch.cat([model(batch) for batch in batches])
    compared(run_onnx(source), model, expected, [batches[0], batches[0][:1]], "onnx", task.tolerance)
    file = new if task.format == "onnx" else new.with_name("int8.onnx")
    quantise(source, file, task.images)
    if task.format == "openvino":
        write_openvino(file, new)
    run = run_onnx(new) if task.format == "onnx" else run_openvino(new)
    found = torch.cat([run(batch) for batch in batches])
    classes = bool(classes_of(model))
    same, measure = agreement(found, expected, classes), "same first class" if classes else "mean cosine"
    if not same >= task.least:  # NaN is not
        raise StrataViTError(
            f"export: the int8 file and the model agree on {same:.1f} % over {len(task.images)} images ({measure}), "
            f"below {task.least:g} %; nothing was written: calibrate on more images like those it will see, export in "
            f"float32, or accept it with min_agreement={int(same) if same > 0 else 0}"
        )
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    return Parity(str(task.path), task.format, _size(new), len(task.images), difference, largest, same, measure)


def _example(images: Tensor) -> Tensor:
    """Two images; a copy, as a program keeps its example, and a view would keep all images."""
    return images[:2].clone() if len(images) > 1 else images.repeat(2, 1, 1, 1)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _to_openvino(model: nn.Module, example: Tensor, path: Path) -> None:
    source = path.with_name("float32.onnx")
    write_onnx(model, example, source)
    write_openvino(source, path)


def _to_program(model: nn.Module, example: Tensor, path: Path) -> None:
    with without_their_warnings():
        program = torch.export.export(model, (example,), dynamic_shapes=FREE_BATCH)
        content = io.BytesIO()  # torch aborts the process if the end of a file cannot be written
        torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata_of(model))})
        path.write_bytes(content.getbuffer())


def _run_program(path: Path) -> Runner:
    return torch.export.load(path).module()


def _to_folder(model: nn.Module, example: Tensor, path: Path) -> None:
    save_transformers(model, path)


def _run_folder(path: Path) -> Runner:
    model = load_transformers(path)
    return lambda images: tensor_of(model(pixel_values=images))
