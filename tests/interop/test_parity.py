"""The check of an exported file: a share of the largest logit of each image."""

import sys

import pytest
import torch
from helpers import make_model

import stratavit
from stratavit import StrataViTError
from stratavit.interop.export import FLOOR, TOLERANCE, _difference


@pytest.mark.parametrize(("format", "scale"), [("onnx", 1e-6), ("torch", 1e6)])
def test_parity_does_not_depend_on_the_scale_of_the_outputs(format, scale, tmp_path, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    module = sys.modules["stratavit.interop.export"]
    model = make_model("plain").eval()
    with torch.no_grad():
        model.head.weight *= scale
        model.head.bias *= scale
    stratavit.export(model, tmp_path / "sound", format)
    name = {"onnx": "_run_onnx", "torch": "_run_program"}[format]
    run = getattr(module, name)

    def wrong(path):
        answer = run(path)
        return lambda images: answer(images) * 0.99

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(StrataViTError, match="differ"):
        stratavit.export(model, tmp_path / "wrong", format)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("error", "sound"), [(0.5, True), (0.0, True), (2.0, False), (float("nan"), False)])
def test_the_limit_is_that_of_every_image_by_itself(scale, error, sound):

    expected = torch.ones(3, 7)
    expected[0] *= 1000  # the logits of one image are no excuse for another's
    expected *= scale
    found = expected.clone()
    found[1, 2] += error * (TOLERANCE * scale + FLOOR)
    if sound:
        assert _difference(found, expected, "onnx", TOLERANCE) <= TOLERANCE * scale + FLOOR
    else:
        with pytest.raises(StrataViTError, match="differ"):
            _difference(found, expected, "onnx", TOLERANCE)


def test_outputs_that_are_all_zero():

    assert _difference(torch.zeros(2, 3), torch.zeros(2, 3), "torch", TOLERANCE) == 0
    with pytest.raises(StrataViTError, match="differ"):
        _difference(torch.full((2, 3), 1e-6), torch.zeros(2, 3), "torch", TOLERANCE)
