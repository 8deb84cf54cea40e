"""Exported files compute what the model does, at any batch size, or are not there."""

import json
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import CLASSES, make_images, make_net
from image_folders import write_images
from torch.overrides import TorchFunctionMode

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.cli.parser import main
from stratavit.interop.export import SUFFIXES
from stratavit.interop.exported_model import exported_model
from stratavit.interop.onnx_file import FourAxes

SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}


def small(method="default"):
    return make_net("plain", method).extract(spec=SPEC, verbose=False)


def run_onnx(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def run_program(path, images):
    return torch.export.load(path).module()(images)


RUN = {"onnx": run_onnx, "torch": run_program}
COMPARED = make_images(100, seed=3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Format -> model in training mode, exported from inside a wrapper; file; what `export` returned."""
    folder, found = tmp_path_factory.mktemp("export"), {}
    for name in RUN:
        model, path = small().train(), folder / f"small{SUFFIXES[name]}"
        found[name] = model, path, stratavit.export(torch.nn.DataParallel(model), path, name, COMPARED)
    assert sorted(path.name for path in folder.iterdir()) == ["small.onnx", "small.pt2"]
    return found


@pytest.mark.parametrize("name", RUN)
def test_exported_is_eager_at_any_batch_size(exported, name):
    model, path, parity = exported[name]
    eager = small()
    assert (parity.file, parity.format, parity.images, parity.size) == (str(path), name, 100, path.stat().st_size)
    assert parity.size < COMPARED.nbytes / 2  # they stay out of the file, though a program keeps its example
    assert "largest logit difference" in str(parity)
    with torch.no_grad():
        for count in (1, 2, 7):
            images = make_images(count, seed=9)
            assert torch.allclose(RUN[name](path, images), eager(images), atol=1e-5)
        assert parity.largest == pytest.approx(float(eager(COMPARED).abs().max()))
    assert 0 <= parity.difference < 1e-5
    assert model.training
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parts"), [("onnx", ("write_onnx", "run_onnx")), ("torch", ("_to_program", "_run_program"))]
)
def test_a_file_whose_outputs_differ_is_not_kept(tmp_path, monkeypatch, name, parts):
    module, output = sys.modules["stratavit.interop.export"], partial(torch.full_like, fill_value=0.01)
    monkeypatch.setattr(module, parts[0], lambda model, example, path, *options: path.touch())
    monkeypatch.setattr(module, parts[1], lambda path: lambda images: output(images[:, 0, 0, :CLASSES]))
    (tmp_path / "old").write_text("kept")
    with pytest.raises(StrataViTError, match=f"{name} file"):
        stratavit.export(small("paper"), tmp_path / "old", name, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_mistakes(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for error, words, model, name, options in (
        (StrataViTError, "'tflite'", small(), "m", ["tflite"]),
        (StrataViTError, "extract", make_net("plain"), "m", []),
        (StrataViTError, r"model\.float\(\)", small().half(), "m", []),
        (StrataViTError, "transformers", small(), "m", ["transformers"]),
        (StrataViTError, "images", small(), "m", ["torch", make_images(2)[:0]]),
        (StrataViTError, "half", small(), "m", ["transformers", None, False, 1e-4, True]),
        (StrataViTError, "opset", small(), "m", ["torch", None, False, 1e-4, False, 18]),
        (StrataViTError, r"pip install 'stratavit\[export\]'", small(), "m.onnx", []),
        (StrataViTError, r"ends in \.onnx", small(), "m.onx", []),
        (StrataViTError, r"ends in \.onnx", small(), "m.pt2", []),
        (StrataViTError, r"ends in \.pt2", small(), "m.onnx", ["torch"]),
        (StrataViTError, "openvino is a folder", small(), "m.onnx", ["openvino"]),
        (ArtifactError, "taken exists", small(), "taken", []),
        (ArtifactError, "cannot write", small(), "taken/m.pt2", ["torch"]),
    ):
        with pytest.raises(error, match=words):
            stratavit.export(model, tmp_path / name, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def opset_of(path):
    import onnx

    return next(one.version for one in onnx.load(path).opset_import if one.domain == "")


@pytest.mark.parametrize("name", RUN)
def test_in_half_precision_images_and_logits_stay_as_they_are(tmp_path, name):
    model, path = small(), tmp_path / f"half{SUFFIXES[name]}"
    parity = stratavit.export(model, path, name, COMPARED, half=True)
    images = make_images(3, seed=9)
    with torch.no_grad():
        found, expected = RUN[name](path, images), model(images)
    assert found.dtype is torch.float32
    off = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-5 < off < 0.02
    assert parity.difference > 1e-5
    assert next(model.parameters()).dtype is torch.float32


def test_the_opset_is_the_one_that_was_asked_for(tmp_path):
    stratavit.export(small(), tmp_path / "new.onnx", opset=20)
    assert opset_of(tmp_path / "new.onnx") == 20
    with pytest.raises(StrataViTError, match="opset 13"):  # it has no layer norm
        stratavit.export(small(), tmp_path / "old.onnx", opset=13)
    assert not (tmp_path / "old.onnx").exists()


def test_a_file_is_a_model_that_can_be_measured(exported):
    model, path, _ = exported["onnx"]
    file, images = exported_model(path), make_images(5, seed=9)
    assert torch.allclose(file(images), RUN["onnx"](path, images))
    assert file.num_classes == CLASSES
    assert file.data_config["input_size"] == [3, 32, 32]
    loader = [(images, torch.arange(5) % CLASSES)]
    assert stratavit.evaluate(file, loader).loss == pytest.approx(stratavit.evaluate(model, loader).loss, rel=1e-4)


def test_files_that_are_no_such_model(tmp_path, exported, monkeypatch):
    import onnx

    (tmp_path / "text.onnx").write_text("no model")
    foreign = onnx.load(exported["onnx"][1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name, words in (("none", "not a file"), ("text", "cannot|not an ONNX"), ("foreign", "data_config")):
        with pytest.raises(ArtifactError, match=words):
            exported_model(tmp_path / f"{name}.onnx")
    with pytest.raises(StrataViTError, match="cannot run images"):
        exported_model(exported["onnx"][1])(make_images(2)[:, :1])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StrataViTError, match="pip install"):
        exported_model(exported["onnx"][1])


def test_the_command(tmp_path, capsys):
    stratavit.save(small(), tmp_path / "small")
    write_images(tmp_path / "data", ("val",))
    command = ["export", tmp_path / "small", "--format", "torch", "--data", tmp_path / "data", "--workers", "0"]
    command = [str(part) for part in command]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == CLASSES
    assert run_program(tmp_path / "small.pt2", make_images(2)).shape == (2, CLASSES)
    assert main(command) == 2
    assert "small.pt2 exists" in capsys.readouterr().err


def test_shapes_of_a_published_model(tmp_path):
    net = stratavit.SuperNet(timm.create_model("deit_tiny_patch16_224", depth=2))
    spec = {site.name: site.steps[len(site.steps) // 2] for site in net.sites} | {"blocks.1.attn": 0}
    parity = stratavit.export(net.extract(spec=spec), tmp_path / "m.pt2", "torch")
    assert parity.difference < 1e-4


class Axes(TorchFunctionMode):
    """Notes how many axes the queries of attention have."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[0].ndim)
        return func(*args, **(kwargs or {}))


def test_attention_of_more_axes_is_the_same_on_four():
    """What the files of Twins and Hiera hold, whose attention has an axis of windows."""
    q, k, v = torch.randn(3, 2, 3, 2, 5, 4).unbind()  # [B, windows, H, N, a]
    seen = torch.rand(2, 3, 2, 5, 5) < 0.5
    for mask in (None, torch.randn(5, 5), torch.randn(3, 1, 5, 5), seen | torch.eye(5, dtype=torch.bool)):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        with Axes() as axes, FourAxes():
            found = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        assert torch.allclose(found, expected, atol=1e-6)
        assert axes.seen == [4]
    with Axes() as axes:
        F.scaled_dot_product_attention(q, k, v)
    assert axes.seen == [5]
