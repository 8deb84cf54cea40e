"""Exported files compute what the model does, at any batch size, or are not there."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers import CLASSES, make_images, make_net
from image_folders import write_images

import stratavit
from stratavit import ArtifactError, StrataViTError
from stratavit.cli.parser import main
from stratavit.interop.export import SUFFIXES

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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Format -> model, file and what `export` returned."""
    folder, found = tmp_path_factory.mktemp("export"), {}
    for name in RUN:
        model, path = small(), folder / f"small{SUFFIXES[name]}"
        found[name] = model, path, stratavit.export(model, path, name, make_images(5, seed=3))
    assert sorted(path.name for path in folder.iterdir()) == ["small.onnx", "small.pt2"]
    return found


@pytest.mark.parametrize("name", RUN)
def test_exported_is_eager_at_any_batch_size(exported, name):
    model, path, _ = exported[name]
    for count in (1, 2, 7):
        images = make_images(count, seed=9)
        with torch.no_grad():
            assert torch.allclose(RUN[name](path, images), model(images), atol=1e-5)


@pytest.mark.parametrize("name", RUN)
def test_what_export_reports(exported, name):
    model, path, parity = exported[name]
    assert (parity.file, parity.format, parity.images) == (str(path), name, 5)
    assert parity.size == path.stat().st_size
    assert 0 <= parity.difference < 1e-5
    with torch.no_grad():
        assert parity.largest == pytest.approx(float(model(make_images(5, seed=3)).abs().max()))
    assert "largest logit difference" in str(parity)


def test_the_images_that_are_compared_stay_out_of_the_file(exported, tmp_path):
    """A program keeps its example."""
    model, path, _ = exported["torch"]
    many = stratavit.export(model, tmp_path / path.name, "torch", make_images(200, seed=3))
    assert abs(many.size - path.stat().st_size) < make_images(1).nbytes


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
@pytest.mark.parametrize(("name", "part"), [("onnx", "onnx"), ("torch", "program")])
def test_a_file_whose_outputs_differ_is_not_kept(tmp_path, monkeypatch, name, part, wrong):
    module, answer = sys.modules["stratavit.interop.export"], partial(torch.full_like, fill_value=wrong)
    monkeypatch.setattr(module, f"_to_{part}", lambda model, example, path: path.touch())
    monkeypatch.setattr(module, f"_run_{part}", lambda path: lambda images: answer(images[:, 0, 0, :CLASSES]))
    (tmp_path / "old").write_text("kept")
    with pytest.raises(StrataViTError, match=f"{name} file"):
        stratavit.export(small("paper"), tmp_path / "old", name, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_training_mode_and_weights_are_left_as_they_were(tmp_path):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stratavit.export(model, tmp_path / "m.pt2", "torch")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mistakes(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for error, words, model, name, options in (
        (StrataViTError, "'tflite'", small(), "m", ["tflite"]),
        (StrataViTError, "extract", make_net("plain"), "m", []),
        (StrataViTError, r"model\.float\(\)", small().half(), "m", []),
        (StrataViTError, "transformers", small(), "m", ["transformers"]),
        (StrataViTError, "images", small(), "m", ["torch", make_images(2)[:0]]),
        (StrataViTError, r"pip install 'stratavit\[export\]'", small(), "m.onnx", []),
        (ArtifactError, "taken exists", small(), "taken", []),
        (ArtifactError, "cannot write", small(), "taken/m.pt2", ["torch"]),
    ):
        with pytest.raises(error, match=words):
            stratavit.export(model, tmp_path / name, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


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


@pytest.mark.real_weights
def test_the_real_model_at_half_size(deit_tiny, tmp_path):
    """The exporter sees the real shapes; one format, as twelve blocks are slow."""
    net = stratavit.SuperNet(deit_tiny)
    spec = {site.name: site.steps[len(site.steps) // 2] for site in net.sites} | {"blocks.5.attn": 0, "blocks.7.mlp": 0}
    parity = stratavit.export(net.extract(spec=spec), tmp_path / "m.pt2", "torch")
    assert parity.difference < 1e-4
