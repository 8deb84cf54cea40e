"""ONNX files in int8: the linear layers quantised by ONNX Runtime.

Only linear layers with fixed weights are quantised: their weights per output channel, their inputs per tensor by ranges
that are measured on images. Softmax, norms, GELU, the products of attention and all sums stay in float32, and so do the
outputs of the layers: to round these, too, costs accuracy, and what follows computes in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from stratavit.errors import StrataViTError, one_line
from stratavit.interop.onnx_file import INPUT, quiet_log, without_their_warnings

BATCH = 32  # images that are run at once
LAYERS = ("MatMul", "Gemm")  # operators that linear layers become


def quantise(source: Path, path: Path, images: Tensor) -> None:
    """Writes an ONNX file in int8, with the metadata of the one that it is made from.

    Args:
        source: A file of `write_onnx`, in float32.
        path: The file to write.
        images: ``[B, C, H, W]``, prepared for the model; the ranges of inputs are their smallest and largest values.

    Raises:
        StrataViTError: Packages are missing, or no layer can be quantised.
    """
    import onnx

    try:
        from onnxruntime import quantization
    except ImportError as error:
        raise StrataViTError(
            f"int8 needs ONNX Runtime's tools ({one_line(error)}): pip install 'stratavit[export]'"
        ) from error
    with without_their_warnings(), quiet_log():
        quantization.quantize_static(
            source,
            path,
            _Feed(images),
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(LAYERS)},
        )
    made = onnx.load(path)
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise StrataViTError("export: no linear layer of this model could be quantised; export it without int8")
    facts = {one.key: one.value for one in onnx.load(source).metadata_props}
    onnx.helper.set_model_props(made, facts)
    onnx.save(made, path)


class _Feed:
    """Batches as ONNX Runtime reads them."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the name of its input; None after the last one."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}
