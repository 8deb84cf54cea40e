"""Exports in int8 say how far they agree with the model and are kept above a bound only; OpenVINO's are the model."""

import json
import subprocess
import sys

import onnx
import pytest
import torch
from helpers import CLASSES, make_images, make_model, make_net
from image_folders import write_images

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.cli.parser import main
from stratavit.interop.exported_model import exported_model

SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 20}
MERGING = {"blocks.0.tokens": 12, "blocks.1.mlp": 20}
IMAGES = make_images(40, seed=3)  # more than are run at once
NAMES = {"onnx": "small.onnx", "openvino": "small"}


def small(spec=SPEC):
    return make_net("plain").extract(spec=spec, verbose=False)


def features():
    model = make_model("plain")
    model.reset_classifier(0)
    return model


def outlier():
    """A model with one large channel that its head does not read: rounded by that channel's range, nothing is left."""
    model = make_model("plain")
    with torch.no_grad():
        model.norm.weight[0] = 1e5
        model.head.weight[:, 0] = 0
    return model


@pytest.fixture(
    scope="module", params=[("onnx", "cut"), ("openvino", "cut"), ("onnx", "merging"), ("onnx", "features")]
)
def exported(request, tmp_path_factory):
    """Model, file, what `export` returned."""
    format, kind = request.param
    model = {"cut": small, "merging": lambda: small(MERGING), "features": features}[kind]()
    path = tmp_path_factory.mktemp("int8") / NAMES[format]
    return model, path, stratavit.export(model, path, format, IMAGES, int8=True, min_agreement=0)


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(part) for part in IMAGES.split(7)])  # other batches than those of the export


def test_the_agreement_reported_is_that_of_the_file(exported):
    model, path, parity = exported
    found, expected = outputs(exported_model(path)), outputs(model)
    if model.num_classes:
        same = float((found.argmax(1) == expected.argmax(1)).double().mean())
    else:
        same = float(torch.nn.functional.cosine_similarity(found, expected).mean())
    assert parity.agreement == pytest.approx(100 * same, abs=1e-3)
    assert 60 < parity.agreement <= 100
    assert parity.measure in str(parity)
    assert parity.difference == pytest.approx(float((found - expected).abs().max()), rel=1e-3)
    assert 1e-3 < parity.difference < parity.largest


def test_the_file_holds_what_is_needed(exported):
    _, path, parity = exported
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    assert sorted(path.parent.iterdir()) == [path]
    assert parity.size == sum(file.stat().st_size for file in files)
    assert exported_model(path).data_config["input_size"] == [3, 32, 32]
    if path.is_dir():
        assert [file.name for file in files] == ["openvino_model.bin", "openvino_model.xml"]
        assert torch.equal(outputs(exported_model(path)), outputs(exported_model(files[1])))


def test_linear_layers_are_int8_by_channel_and_nothing_else(tmp_path):
    model = small()
    stratavit.export(model, tmp_path / "m.onnx", images=IMAGES, int8=True, min_agreement=0)
    graph = onnx.load(tmp_path / "m.onnx").graph
    whole = {one.name: list(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8}
    weights = [dims for dims in whole.values() if len(dims) == 2]
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.weight.numel()]
    assert sorted(sorted(dims) for dims in weights) == sorted(sorted(layer.weight.shape) for layer in linear)
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    sizes = {one.name: onnx.numpy_helper.to_array(one).size for one in graph.initializer}
    assert all(sizes[scales[name]] in dims for name, dims in whole.items() if len(dims) == 2)
    quantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in graph.node if quantised & set(node.input)}
    assert readers == {"MatMul", "Gemm"}


@pytest.mark.parametrize("format", NAMES)
def test_poor_agreement_is_refused_with_its_figure(tmp_path, format):
    path, model = tmp_path / "old", outlier()
    with pytest.raises(StrataViTError, match=r"agree on \d+\.\d %.* over 40 images.* min_agreement="):
        stratavit.export(model, path, format, IMAGES, int8=True)
    assert list(tmp_path.iterdir()) == []
    parity = stratavit.export(model, path, format, IMAGES, int8=True, min_agreement=0)
    assert parity.agreement < 90
    with pytest.raises(StrataViTError, match=f"below {parity.agreement + 1:g} %"):
        stratavit.export(model, path, format, IMAGES, True, int8=True, min_agreement=parity.agreement + 1)
    assert outputs(exported_model(path)).shape == (40, CLASSES)  # what was there is there


def test_mistakes_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for words, options in (
        ("torch", {"format": "torch", "int8": True, "images": IMAGES}),
        ("transformers", {"format": "transformers", "int8": True, "images": IMAGES}),
        ("half", {"int8": True, "half": True, "images": IMAGES}),
        ("half", {"format": "openvino", "half": True}),
        ("opset", {"format": "openvino", "opset": 18}),
        ("images", {"int8": True}),
        ("min_agreement", {"min_agreement": 80}),
        ("min_agreement", {"int8": True, "images": IMAGES, "min_agreement": 101}),
        (r"stratavit\[openvino\]", {"format": "openvino"}),
    ):
        with pytest.raises(StrataViTError, match=words):
            stratavit.export(small(), tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_openvino_is_eager_at_any_batch_size(tmp_path):
    model, path = small(), tmp_path / "small"
    parity = stratavit.export(model, path, "openvino", IMAGES)
    file = exported_model(path / "openvino_model.xml")
    assert file.num_classes == CLASSES
    with torch.no_grad():
        for count in (1, 2, 7):
            images = make_images(count, seed=9)
            assert torch.allclose(file(images), model(images), atol=1e-5)
    assert (parity.file, parity.format, parity.agreement) == (str(path), "openvino", None)
    assert 0 <= parity.difference < 1e-5
    with pytest.raises(ArtifactError, match="not empty"):
        stratavit.export(model, path, "openvino", IMAGES)


def test_signals_are_handled_after_openvino_was_used(tmp_path):
    """Models end in the order in which they began, as they do where one name is used for one after another."""
    stratavit.export(small(), tmp_path / "model", "openvino", IMAGES)
    code = (
        "import os, signal, sys\nfrom stratavit.interop.exported_model import exported_model\n"
        "first, second = exported_model(sys.argv[1]), exported_model(sys.argv[1])\ndel first\ndel second\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled', flush=True))\nos.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n")


def test_files_that_are_not_openvinos(tmp_path):
    (tmp_path / "text.xml").write_text("no model")
    with pytest.raises(ArtifactError, match="OpenVINO"):
        exported_model(tmp_path / "text.xml")
    with pytest.raises(ArtifactError, match="not a file"):
        exported_model(tmp_path / "none.xml")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "nowhere", "--int8"]) == 2
    assert "--data" in capsys.readouterr().err  # before the model is looked for
    assert main(["export", "nowhere", "--int8", "--format", "torch"]) == 2
    assert "int8 is for onnx and openvino" in capsys.readouterr().err
    model = small()
    model.pretrained_cfg = {"label_names": [f"class {number}" for number in range(CLASSES)]}
    stratavit.save(model, "small")
    write_images(tmp_path / "data")
    data = ["--data", "data", "--workers", "0", "--json"]
    for format, file in (("onnx", "small-int8.onnx"), ("openvino", "small-int8-openvino")):
        assert main(["export", "small", "--format", format, "--int8", "--min-agreement", "0", *data]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["file"], said["images"]) == (file, CLASSES)
        assert 0 <= said["agreement"] <= 100
        assert main(["evaluate", file, *data]) == 0
        assert json.loads(capsys.readouterr().out)["n"] == CLASSES
        assert stratavit.class_names_of(exported_model(file))[1] == "class 1"
