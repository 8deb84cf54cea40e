"""Dense models by name: weights from a file or the hub, strictly, and nothing in a file is run."""

import pickle

import pytest
import timm
import torch
from helpers import Bomb, enliven
from safetensors.torch import save_file

from stratavit import ArtifactError, StrataViTError
from stratavit.artifacts.model_loading import dense_model, read_checkpoint

NAME = "test_vit"  # timm's own tiny ViT for tests: width 64, 6 blocks


@pytest.fixture(scope="module")
def source():
    return enliven(timm.create_model(NAME, num_classes=3)).eval()


def save_pickled(content, path):
    torch.save(content, path)


FORMS = {
    "safetensors": ("w.safetensors", lambda state, path: save_file(state, path)),
    "pth": ("w.pth", save_pickled),
    "nested in state_dict": ("w.pth", lambda state, path: save_pickled({"state_dict": state, "epoch": 3}, path)),
    "nested in model": ("w.pth", lambda state, path: save_pickled({"model": state}, path)),
    "of a wrapped module": ("w.pt", lambda state, path: save_pickled({f"module.{n}": state[n] for n in state}, path)),
    "old torch file": ("w.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
}


@pytest.mark.parametrize("form", FORMS)
def test_local_weights_give_the_same_model(source, tmp_path, form):
    name, write = FORMS[form]
    write(source.state_dict(), tmp_path / name)
    model = dense_model(NAME, tmp_path / name, num_classes=3)
    assert not model.training
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pretrained_tag_is_understood(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = dense_model(f"{NAME}.r160_in1k", tmp_path / "w.safetensors", num_classes=3)
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize(("classes", "ours"), [(None, 1000), (5, 5)])
def test_wrong_head_names_both_sizes_and_the_option(source, tmp_path, classes, ours):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=rf"head\.bias has shape \(3,\), .* expects \({ours},\).*--num-classes"):
        dense_model(NAME, tmp_path / "w.safetensors", num_classes=classes)


@pytest.mark.parametrize(
    ("name", "words"),
    [("deit_tinny_patch16_224", "did you mean deit_tiny_patch16_224"), ("qqqqqqq", r"timm\.list_models\(\)")],
)
def test_unknown_names(name, words):
    with pytest.raises(StrataViTError, match=rf"no model named '{name}'; .*{words}"):
        dense_model(name)


def test_hub_weights_are_asked_for_with_the_head(monkeypatch, source):
    asked = {}

    def create(name, **arguments):
        asked.update(arguments, name=name)
        return source.train()

    monkeypatch.setattr(timm, "create_model", create)
    assert not dense_model(NAME, num_classes=3).training
    assert asked == {"name": NAME, "pretrained": True, "num_classes": 3}
    asked.clear()
    dense_model(NAME)
    assert asked == {"name": NAME, "pretrained": True}


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ConnectionError("cannot reach the hub\nsecond line"), "cannot reach the hub; give"),
        (TimeoutError(), "TimeoutError; give"),
        (RuntimeError("x" * 5000), "x{200}; give"),
    ],
)
def test_no_hub_is_one_line_with_the_way_out(monkeypatch, failure, words):
    def create(*args, **kwargs):
        raise failure

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(StrataViTError, match=rf"weights of {NAME}: {words} a local .* with --weights FILE") as caught:
        dense_model(NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w"])
@pytest.mark.parametrize("pickled", ["torch", "plain"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name, pickled):
    content = {"weight": torch.zeros(2), "bomb": Bomb(tmp_path / "exploded")}
    if pickled == "torch":
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ArtifactError, match="holds more than plain tensors"):
        read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_model_is_refused(source, tmp_path):
    torch.save(source, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="holds more than plain tensors"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 5}, {}, {1: torch.zeros(2)}, {"a": "text"}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"weights: .*w\.pth") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated", "folder"])
def test_damaged_files_are_refused_by_name(source, tmp_path, name, damage):
    path = tmp_path / name
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "garbage": b"not weights", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
        dense_model(NAME, path, num_classes=3)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StrataViTError, match=r"gone is neither a folder nor the name of a model"):
        dense_model(str(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "./vit_tiny_patch16_224"])
def test_names_with_a_slash_that_are_nearly_right(name):
    with pytest.raises(StrataViTError, match=r"did you mean .*vit_tiny_patch16_224"):
        dense_model(name)
