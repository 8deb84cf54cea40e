"""Small models in other forms, checked against eager before they are kept: ONNX, torch.export, transformers."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratavit.choices import SUFFIXES as SUFFIXES
from stratavit.choices import Format as Format
from stratavit.data.batches import check_finite, check_images, unpack
from stratavit.data.class_names import class_names_of
from stratavit.errors import StrataViTError
from stratavit.files.atomic import followed, move_into_place, temporary_sibling
from stratavit.files.folders import check_free, check_free_file
from stratavit.interop.libraries import as_timm
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.interop.transformers.folders import load_transformers, save_transformers
from stratavit.models.architecture import resolve_data_config
from stratavit.models.number_types import HALF_TOLERANCE, InHalf
from stratavit.utils.model import eval_mode, is_super_network, model_device, model_dtype
from stratavit.utils.wrappers import unwrapped

TOLERANCE = 1e-4  # of the largest logit of an image
FLOOR = 1e-10  # and this: what is left where logits cancel out
NOISE_IMAGES = 8
INPUT, OUTPUT = "images", "logits"
METADATA = "stratavit.json"  # what a program of torch.export holds `metadata_of` under
FREE_BATCH = ({0: torch.export.Dim("batch", min=1)},)
Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with the model it came from.

    Attributes:
        file: The file, or the folder of ``transformers``.
        format: ``onnx``, ``torch`` or ``transformers``.
        size: Of the file or the folder, bytes.
        images: Number of images compared.
        difference: Largest absolute difference of a logit.
        largest: Largest absolute logit.
    """

    file: str
    format: Format
    size: int
    images: int
    difference: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"wrote {self.file} ({self.size / 2**20:.3g} MiB); largest logit difference to eager {self.difference:.1e} "
            f"over {self.images} images (largest logit {self.largest:.3g})"
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: Format = "onnx",
    images: Tensor | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
    half: bool = False,
    opset: int | None = None,
) -> Parity:
    """Writes a model to one file that needs neither this library nor timm; the batch size is free.

    The file is read back and run (ONNX Runtime, or `torch.export.load`) on the images, one batch and one image alone,
    and kept only if its outputs are the model's. The folder that ``transformers`` writes by ``save_pretrained`` is
    compared on the batch; `load_transformers` reads it.

    Args:
        model: What `SuperNet.extract` or `load` returned, in float32; exported as in eval mode, on the CPU.
        path: File to write; a folder for ``transformers``.
        format: ``onnx``, by torch's own exporter (torch.export), ``torch``, a program for `torch.export.load`, or
            ``transformers``, for models that came from there.
        images: To compare on, ``[B, C, H, W]``, prepared for the model; noise if None.
        overwrite: Replace the file if it is there.
        tolerance: Largest difference of a logit that passes, as a share of the largest logit of its image (and
            `FLOOR` more), so that logits of any scale are judged alike; with `half` at least `HALF_TOLERANCE`.
        half: Weights and arithmetic in float16; images and logits stay in float32. Not for ``transformers``.
        opset: Version of ONNX operators; torch's choice if None.

    Returns:
        Where it was written, its size in bytes, and by how much its outputs differ from the model's.

    Raises:
        StrataViTError: Not a small model in float32, an unknown format, options that it does not have, images that do
            not fit the model, packages are missing, or the outputs of the file differ from the model's; then nothing
            is left.
        ArtifactError: The file exists or cannot be written.
    """
    if format not in SUFFIXES:
        raise StrataViTError(f"export: expected a format of {', '.join(SUFFIXES)}, got {format!r}")
    if half and format == "transformers":
        raise StrataViTError("export: half is for onnx and torch; save_pretrained keeps the type of the weights")
    if opset is not None and format != "onnx":
        raise StrataViTError(f"export: opset is a version of ONNX operators, and the format is {format}; leave it out")
    model = unwrapped(model)
    if is_super_network(model):
        raise StrataViTError("export: a super-network has many sizes; extract one first")
    if model_dtype(model) is not torch.float32:
        raise StrataViTError(f"export: the model is in {model_dtype(model)}; call model.float() first")
    model, path = as_timm(model), Path(path)
    (check_free if format == "transformers" else check_free_file)(path, overwrite)
    if format == "transformers" and not getattr(model, "origin", None):
        raise StrataViTError("export: format transformers is for models that came from there; this one is timm's")
    if images is None:
        size = resolve_data_config(model)["input_size"]
        images = torch.randn(NOISE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    images, _ = unpack((images,), "export")
    check_images(model, images, "export")
    check_finite(images, "export")
    if not len(images):
        raise StrataViTError("export: there are no images to compare on; give at least one, or leave images out")
    images = images.float().cpu()
    device = model_device(model)
    try:
        with eval_mode(model), torch.no_grad():
            written = InHalf(model.cpu()).eval() if half else model.cpu()
            tolerance = max(tolerance, HALF_TOLERANCE) if half else tolerance
            return _checked(model, written, path, format, images, tolerance, overwrite, opset)
    finally:
        model.to(device)


def _checked(
    model: nn.Module,
    written: nn.Module,
    path: Path,
    format: Format,
    images: Tensor,
    tolerance: float,
    overwrite: bool,
    opset: int | None,
) -> Parity:
    """Writes next to `path`, compares with the model, moves it there."""
    writers: dict[Format, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Runner]]] = {
        "onnx": (partial(_to_onnx, opset=opset), _run_onnx),
        "torch": (_to_program, _run_program),
        "transformers": (_to_folder, _run_folder),
    }
    write, run = writers[format]
    target = followed(path)
    with temporary_sibling(target) as place:
        new = place if format == "transformers" else place.with_suffix(SUFFIXES[format])  # torch asks for its own
        # a copy: the program keeps its example, and a view would keep all images
        write(written, images[:2].clone() if len(images) > 1 else images.repeat(2, 1, 1, 1), new)
        expected, exported = model(images), run(new)
        batches = [images] if format == "transformers" else [images, images[:1]]  # what is eager has no fixed size
        found = torch.cat([exported(batch) for batch in batches])
        difference = _difference(found, torch.cat([expected[: len(b)] for b in batches]), format, tolerance)
        size = sum(file.stat().st_size for file in (new.iterdir() if new.is_dir() else [new]))
        move_into_place(new, target, overwrite)
    return Parity(str(path), format, size, len(images), difference, float(expected.abs().max()))


def _difference(found: Tensor, expected: Tensor, format: Format, tolerance: float) -> float:
    differences, largest = (x.abs().flatten(1).amax(1) for x in (found - expected, expected))  # [B]
    beyond = differences / (tolerance * largest + FLOOR)
    if not bool((beyond <= 1).all()):  # NaN does not pass either
        worst = int(beyond.nan_to_num(torch.inf).argmax())
        difference, size = float(differences[worst]), float(largest[worst])
        raise StrataViTError(
            f"export: the outputs of the {format} file differ from the model's: a logit by {difference:.2e}, "
            f"more than {tolerance:.0e} of the largest logit of that image, {size:.3g}; nothing was written"
        )
    return float(differences.max())


@contextmanager
def without_their_warnings() -> Iterator[None]:
    """Drops what exporters and compilers warn about their own parts; what they say of our calls is kept."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!stratavit\b)")
        yield


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Drops what is logged of attempts to reach an older opset; whether it was reached is looked at afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def metadata_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of its images and classes: ``data_config``, and ``label_names`` if they are known."""
    names = class_names_of(model)
    return {"data_config": resolve_data_config(model), **({"label_names": names} if names else {})}


def _to_onnx(model: nn.Module, example: Tensor, path: Path, opset: int | None = None) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StrataViTError("export to ONNX needs more packages: pip install 'stratavit[export]'") from error
    with without_their_warnings(), _quiet_log(), redirect_stdout(io.StringIO()):  # some releases print what they did
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=FREE_BATCH,
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=opset,
        )
    made = onnx.load(path)
    got = next(one.version for one in made.opset_import if one.domain in ("", "ai.onnx"))
    if opset not in (None, got):
        raise StrataViTError(f"export: this model cannot be written in opset {opset}; torch wrote {got}, take that")
    onnx.helper.set_model_props(made, {key: json.dumps(value) for key, value in metadata_of(model).items()})
    onnx.save(made, path)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; 0 threads is what it chooses itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_onnx(path: Path) -> Runner:
    session = onnx_session(path)
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


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
