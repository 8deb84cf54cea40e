"""What may be chosen by name, in Python and on the command line; known before anything that is slow is imported."""

from __future__ import annotations

from typing import Literal, get_args

Axes = Literal["auto", "width", "both"]  # that a budget may cut
ListAxes = Literal["width", "both"]  # of a dropout list
Criterion = Literal["output", "wpac", "random", "magnitude", "taylor", "hessian", "pca"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Format = Literal["onnx", "openvino", "torch", "transformers"]
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "openvino": "-openvino",
    "torch": ".pt2",
    "transformers": "-transformers",
}
FOLDERS: tuple[Format, ...] = ("openvino", "transformers")  # are folders, the others files
INT8_FORMATS: tuple[Format, ...] = ("onnx", "openvino")
COMPARED, CALIBRATED = 32, 256  # images that an export reads: to compare on, and to calibrate int8 on, too
MIN_AGREEMENT = 90.0  # percent: below, an int8 file is refused; one image in ten with another class is another model
Measure = Literal["auto", "top1", "cost"]  # of what a bypass costs, see `sensitivity.bypass_sensitivity`
NEIGHBOURS = 20  # of an image, as DINO and DINOv2 are evaluated
Objective = Literal["auto", "label", "cross_entropy", "prediction", "sampled", "feature"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
Precision = Literal["float32", "float16", "bfloat16"]
Units = Literal["default", "gpu"]  # that a dropout list cuts in, see `elastic.site.with_units`
Runtime = Literal["eager", "compiled", "cudagraphs", "onnx"]
SumsPlace = Literal["auto", "device", "host"]  # where sums of covariances are kept while images run
