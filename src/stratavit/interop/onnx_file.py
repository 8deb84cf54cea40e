"""ONNX files: written by torch's exporter, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stratavit.data.class_names import class_names_of
from stratavit.errors import StrataViTError
from stratavit.models.architecture import resolve_data_config
from stratavit.utils.model import classes_of

INPUT, OUTPUT = "images", "logits"
FREE_BATCH = ({0: torch.export.Dim("batch", min=1)},)
Runner = Callable[[Tensor], Tensor]


@contextmanager
def without_their_warnings() -> Iterator[None]:
    """Drops what exporters and compilers warn about their own parts; what they say of our calls is kept."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!stratavit\b)")
        yield


@contextmanager
def quiet_log() -> Iterator[None]:
    """Drops what libraries log; what matters of it, such as whether an opset was reached, is looked at afterwards."""
    before, handlers = logging.root.manager.disable, logging.root.handlers[:]
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # `logging.warning` adds one


class FourAxes(TorchFunctionMode):
    """Within it, attention of more axes than batch, heads, tokens, width runs on four, which ONNX writers know.

    Windows or groups of tokens (Twins, Hiera) become part of the batch. Modules and their flags stay as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function of torch; of attention, with fewer axes."""
        if func is F.scaled_dot_product_attention and args and args[0].ndim > 4:
            return attend_on_four_axes(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend_on_four_axes(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Tensor:
    """`scaled_dot_product_attention` of q, k and v ``[*front, H, N, a]``, each with the same axes in front."""
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2]).flatten(0, -4)
    front = q.shape[:-3]
    q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)  # [front, H, N, a]
    return F.scaled_dot_product_attention(q, k, v, attn_mask, *rest, **more).unflatten(0, front)


def metadata_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of its images and outputs: ``data_config``, and ``label_names`` if they are known.

    Of a model that returns features or maps also ``num_classes``, 0, and the number of ``prefix_tokens`` (class,
    registers) in front of the patches of a map.
    """
    names = class_names_of(model)
    found = {"data_config": resolve_data_config(model), **({"label_names": names} if names else {})}
    prefix = getattr(model, "num_prefix_tokens", 0)
    return found if classes_of(model) else {**found, "num_classes": 0, "prefix_tokens": prefix}


def texts_of(model: nn.Module) -> dict[str, str]:
    """The parts of `metadata_of` as JSON texts."""
    return {key: json.dumps(value) for key, value in metadata_of(model).items()}


def write_onnx(model: nn.Module, example: Tensor, path: Path, opset: int | None = None) -> None:
    """Writes a model with what `metadata_of` says of it; the batch size is free.

    Args:
        model: In eval mode, on the CPU.
        example: Images ``[2, C, H, W]``.
        path: The file.
        opset: Version of ONNX operators; torch's choice if None.

    Raises:
        StrataViTError: Packages are missing, or torch cannot write that version.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StrataViTError("export to ONNX needs more packages: pip install 'stratavit[export]'") from error
    with (
        without_their_warnings(),
        quiet_log(),
        FourAxes(),
        redirect_stdout(io.StringIO()),
    ):  # some releases print what they did
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
    for node in made.graph.node:  # where each comes from in the source files, with this machine's paths
        del node.metadata_props[:]
    onnx.helper.set_model_props(made, texts_of(model))
    onnx.save(made, path)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU; 0 threads is what it chooses itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path) -> Runner:
    """What maps images ``[B, C, H, W]`` to the outputs of a file of `write_onnx`."""
    session = onnx_session(path)
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
