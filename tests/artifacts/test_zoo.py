"""Dense models by name: weights from a file or the hub, strictly, and nothing in a file is run."""

import pickle

import pytest
import timm
import torch
from helpers import Bomb, enliven
from safetensors.torch import save_file

from stratavit import ArtifactError, StrataViTError
from stratavit.artifacts.model_loading import dense_model
from stratavit.files.torch_checkpoint import read_checkpoint

NAME = "test_vit"  # timm's own tiny ViT for tests: width 64, 6 blocks


@pytest.fixture(scope="module")
def source():
    return enliven(timm.create_model(NAME, num_classes=3)).eval()


def test_local_weights_by_a_name_with_a_pretrained_tag(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = dense_model(f"{NAME}.r160_in1k", tmp_path / "w.safetensors", num_classes=3)
    assert not model.training
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deit_tinny_patch16_224", "did you mean deit_tiny_patch16_224"),
        ("timm/vit_tiny_patch16_224", "did you mean .*vit_tiny_patch16_224"),
        ("qqqqqqq", r"timm\.list_models\(\)"),
        ("/tmp/gone", "is neither a folder nor"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(StrataViTError, match=rf"{name}.*{words}"):
        dense_model(name)


def test_hub_weights_are_requested_with_the_head(monkeypatch, source):
    asked = {}

    def create(name, **arguments):
        asked.update(arguments, name=name)
        return source.train()

    monkeypatch.setattr(timm, "create_model", create)
    assert not dense_model(NAME, num_classes=3).training
    assert asked == {"name": NAME, "pretrained": True, "num_classes": 3}


FAILURES = [(ConnectionError("cannot reach the hub\nsecond line"), "cannot reach the hub")]
FAILURES += [(TimeoutError(), "TimeoutError"), (RuntimeError("x" * 5000), "x{200}")]


@pytest.mark.parametrize(("failure", "words"), FAILURES)
def test_no_hub_is_one_line_with_the_way_out(monkeypatch, failure, words):
    def create(*args, **kwargs):
        raise failure

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(StrataViTError, match=rf"{NAME}: {words}; .* --weights") as caught:
        dense_model(NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("pickled", ["torch", "plain", "model"])
def test_code_in_a_checkpoint_is_not_run(source, tmp_path, pickled):
    for name in ("w.pth", "w.bin", "w"):
        content = {"weight": torch.zeros(2), "bomb": Bomb(tmp_path / "exploded")}
        if pickled == "plain":
            (tmp_path / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(source if pickled == "model" else content, tmp_path / name)
        with pytest.raises(ArtifactError, match=rf"{name} .*holds more than plain tensors"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {}, {1: torch.zeros(2)}, {"a": "text"}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"weights: .*w\.pth") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated"])
def test_damaged_files_are_refused_by_name(source, tmp_path, name, damage):
    if damage != "missing":
        (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not weights")
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
        dense_model(NAME, tmp_path / name, num_classes=3)
    assert "\n" not in str(caught.value)
