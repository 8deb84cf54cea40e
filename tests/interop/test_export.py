"""Exported files answer as the model does, at any batch size, or are not there."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import CLASSES, make_images, make_model, make_net
from PIL import Image

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
    """Format -> model, file and what `export` said."""
    folder, found = tmp_path_factory.mktemp("export"), {}
    for name in RUN:
        model, path = small(), folder / f"small{SUFFIXES[name]}"
        found[name] = model, path, stratavit.export(model, path, name, make_images(5, seed=3))
    assert sorted(path.name for path in folder.iterdir()) == ["small.onnx", "small.pt2"]
    return found


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_exported_is_eager_at_any_batch_size(exported, name, count):
    model, path, _ = exported[name]
    images = make_images(count, seed=9)
    with torch.no_grad():
        assert torch.allclose(RUN[name](path, images), model(images), atol=1e-5)


@pytest.mark.parametrize("name", RUN)
def test_the_images_that_are_compared_stay_out_of_the_file(exported, name, tmp_path):
    model, path, _ = exported[name]
    many = stratavit.export(model, tmp_path / path.name, name, make_images(200, seed=3))
    assert abs(many.size - path.stat().st_size) < make_images(1).nbytes


@pytest.mark.parametrize("name", RUN)
def test_what_export_says(exported, name):
    model, path, parity = exported[name]
    assert (parity.file, parity.format, parity.images) == (str(path), name, 5)
    assert parity.size == path.stat().st_size
    assert 0 <= parity.difference < 1e-5
    with torch.no_grad():
        assert parity.largest == pytest.approx(float(model(make_images(5, seed=3)).abs().max()))
    assert "largest logit difference" in str(parity)


@pytest.mark.parametrize("name", RUN)
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch, name):
    runner = {"onnx": "_run_onnx", "torch": "_run_program"}[name]
    for wrong in (0.01, float("nan")):
        answer = partial(torch.full_like, fill_value=wrong)  # of a tensor [B, 7]
        monkeypatch.setattr(
            sys.modules["stratavit.interop.export"], runner, lambda _, a=answer: lambda x, a=a: a(x[:, 0, 0, :7])
        )
        (tmp_path / "old").write_text("kept")
        with pytest.raises(StrataViTError, match="answers otherwise than the model"):
            stratavit.export(small("paper"), tmp_path / "old", name, overwrite=True)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_training_mode_and_weights_are_left_as_they_were(tmp_path):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stratavit.export(model, tmp_path / "m.pt2", "torch")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(StrataViTError, match="expected a format of onnx, torch, transformers, got 'tflite'"):
        stratavit.export(small(), tmp_path / "m", "tflite")
    with pytest.raises(StrataViTError, match="extract one first"):
        stratavit.export(make_net("plain"), tmp_path / "m")
    with pytest.raises(StrataViTError, match=r"float16; call model.float\(\) first"):
        stratavit.export(small().half(), tmp_path / "m")
    (tmp_path / "taken").touch()
    with pytest.raises(ArtifactError, match="exists"):
        stratavit.export(small(), tmp_path / "taken")
    with pytest.raises(ArtifactError, match="cannot write"):
        stratavit.export(small(), tmp_path / "taken" / "m.pt2", "torch")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(StrataViTError, match=r"pip install 'stratavit\[export\]'"):
        stratavit.export(small(), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command(tmp_path, capsys):
    stratavit.save(small(), tmp_path / "small")
    for name in range(CLASSES):
        (tmp_path / "data" / "val" / str(name)).mkdir(parents=True)
        pixels = np.random.default_rng(name).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "val" / str(name) / "0.png")
    command = [
        "export",
        str(tmp_path / "small"),
        "--format",
        "torch",
        "--data",
        str(tmp_path / "data"),
        "--workers",
        "0",
    ]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == CLASSES
    assert run_program(tmp_path / "small.pt2", make_images(2)).shape == (2, CLASSES)
    assert main(command) == 2
    assert "small.pt2 exists" in capsys.readouterr().err


@pytest.mark.real_weights
def test_the_real_model_at_half_size(deit_tiny, tmp_path):
    """The exporter sees the real shapes; one format, as twelve blocks take a while."""
    net = stratavit.SuperNet(deit_tiny)
    spec = {site.name: site.steps[len(site.steps) // 2] for site in net.sites} | {"blocks.5.attn": 0, "blocks.7.mlp": 0}
    parity = stratavit.export(net.extract(spec=spec), tmp_path / "m.pt2", "torch")
    assert parity.difference < 1e-4


def test_other_families(tmp_path):
    for family in ("layer_scale", "avg_pool", "registers", "distilled"):
        assert stratavit.export(make_model(family), tmp_path / f"{family}.pt2", "torch").difference < 1e-5
