"""Dense models by name: weights from the hub, or from checkpoints of other tools, loaded as timm loads them."""

import argparse
import pathlib
import pickle
import re

import architectures
import numpy as np
import pytest
import timm
import torch
from helpers import Bomb, enliven, same_tensors
from safetensors.torch import save_file

from stratavit import ArtifactError, StrataViTError
from stratavit.artifacts.model_loading import dense_model
from stratavit.files import torch_checkpoint
from stratavit.files.state_dicts import load_weights
from stratavit.files.torch_checkpoint import read_checkpoint
from stratavit.interop.timm_filter import fitted

NAME = "test_vit"  # timm's own tiny ViT for tests: width 64, 6 blocks
LARGER = {"img_size": 224}


@pytest.fixture(scope="module")
def state():
    return enliven(timm.create_model(NAME, num_classes=3)).state_dict()


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


# ---- by name ----------------------------------------------------------------------------------------------------


def test_a_name_with_a_pretrained_tag(state, tmp_path):
    model = dense_model(f"{NAME}.r160_in1k", write(state, tmp_path / "w.safetensors"), num_classes=3)
    assert not model.training
    assert same_tensors(model.state_dict(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("timm/vit_tinny_patch16_224", "did you mean .*vit_tiny_patch16_224"),
        ("someone/thing", "hf-hub:user/name"),
        ("qqqqqqq", r"timm\.list_models\(\)"),
        ("/tmp/gone", "folder"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(StrataViTError, match=rf"{name}.*{words}"):
        dense_model(name)


def test_the_hub_is_asked_for_the_head(monkeypatch):
    asked, made = {}, timm.create_model(NAME)
    monkeypatch.setattr(timm, "create_model", lambda name, **arguments: asked.update(arguments, name=name) or made)
    assert not dense_model(NAME, num_classes=3).training
    assert asked == {"name": NAME, "pretrained": True, "num_classes": 3}


@pytest.mark.parametrize(
    ("failure", "words"), [(ConnectionError("no hub\nsecond line"), "no hub"), (TimeoutError(), "TimeoutError")]
)
def test_no_hub_is_one_line_with_the_way_out(monkeypatch, failure, words):
    def create(*args, **kwargs):
        raise failure

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(StrataViTError, match=rf"^[^\n]*{NAME}: {words}; [^\n]* --weights [^\n]*$"):
        dense_model(NAME)


# ---- as timm does -----------------------------------------------------------------------------------------------

VIT = {"depth": 1, "num_classes": 3}
AS_TIMM = [
    (NAME, {"num_classes": 3}, LARGER),
    ("vit_tiny_patch16_224", VIT, {"img_size": (160, 160)}),
    ("vit_tiny_patch16_224", VIT, {"patch_size": 32}),
    ("vit_small_patch14_reg4_dinov2", VIT | {"img_size": 56}, {"img_size": 112}),
    ("deit_tiny_distilled_patch16_224", VIT, {"img_size": 384}),
    ("flexivit_small", VIT, {"img_size": 320}),
    ("vit_base_patch16_radio_v3", VIT | {"embed_dim": 64, "num_heads": 2, "img_size": 64}, {"img_size": 96}),
    ("eva02_tiny_patch14_224", VIT, {"img_size": 336}),
    ("beit_base_patch16_224", VIT | {"embed_dim": 64, "num_heads": 2}, {"img_size": 384}),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "num_classes": 3}, {"window_size": 8, "img_size": 256}),
    ("resnet10t", {"num_classes": 3}, {}),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), AS_TIMM)
def test_what_is_loaded_is_what_timm_loads(name, ours, theirs):
    given = enliven(timm.create_model(name, **ours | theirs)).state_dict()
    overlay = {"state_dict": dict(given), "num_classes": 3}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **ours).state_dict()
    model = timm.create_model(name, **ours)
    load_weights(model, fitted(name, model, given, "file"), "file")
    assert same_tensors(model.state_dict(), expected)


def original_swin(state):
    """Microsoft's names: downsampling at the end of a stage, the head without a part of its own, and buffers."""
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        found[".".join(parts).replace("head.fc.", "head.")] = tensor
    buffers = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}
    return found | buffers | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swins_own_names(tmp_path, name, capsys):
    model = enliven(timm.create_model(name, depths=(1, 1, 1, 1), num_classes=3))
    given = read_checkpoint(write(original_swin(model.state_dict()), tmp_path / "w.pth"))
    found = fitted(name, model, given, "file")
    assert same_tensors(found, model.state_dict())
    assert capsys.readouterr().err == ""  # buffers that the model makes itself


def test_deit_3_in_metas_own_names():
    name = "deit3_small_patch16_224"
    own = enliven(timm.create_model(name, depth=1, num_classes=3))
    given = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in own.state_dict().items()}
    assert "blocks.0.gamma_1" in given
    assert same_tensors(fitted(name, own, given, "file"), own.state_dict())


def test_dinov2s_own_file_with_registers(capsys):
    name = "vit_small_patch14_reg4_dinov2"
    model = enliven(timm.create_model(name, depth=1, img_size=56))
    own = model.state_dict()
    given = {k: v for k, v in own.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    given |= {"register_tokens": own["reg_token"], "mask_token": torch.zeros(1, 384), "cls_token": own["cls_token"]}
    given["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), own["pos_embed"]], dim=1)
    assert same_tensors(fitted(name, model, given, "file"), own)
    assert "left out mask_token, " in capsys.readouterr().err


# ---- wrappers, nests, company -----------------------------------------------------------------------------------

PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_wrappers_around_all_or_a_block(state, tmp_path, suffix, capsys):
    given = [{prefix + name: tensor for name, tensor in state.items()} for prefix in PREFIXES]
    given.append({name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state.items()})
    for tensors in given:
        assert same_tensors(dense_model(NAME, write(tensors, tmp_path / f"w{suffix}"), 3).state_dict(), state)
    assert capsys.readouterr().err == ""


NESTS = {
    "state_dict": lambda s: {"state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model in module": lambda s: {"model": {"module": s}},
    "state_dict in model": lambda s: {"model": {"state_dict": s}},
    "averaged": lambda s: {"model_ema": s, "epoch": 1},
    "no averages": lambda s: {"state_dict_ema": None, "state_dict": s},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "pytorch-lightning_version": "2"},
    "numpy number": lambda s: {"state_dict": s, "best_acc": np.float64(0.5), "n": np.int64(3)},
    "numpy array": lambda s: {"state_dict": s, "confusion": np.eye(3)},
    "arguments": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=np.float64(1), out=pathlib.Path("a"))},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("nest", NESTS)
def test_weights_in_company(state, tmp_path, nest, old, capsys):
    torch.save(NESTS[nest](state), tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    assert same_tensors(dense_model(NAME, tmp_path / "w.pth", 3).state_dict(), state)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_used_as_timm_does_and_reported(state, tmp_path, key, capsys):
    torch.save({"state_dict": {name: tensor + 1 for name, tensor in state.items()}, key: state}, tmp_path / "w.pth")
    assert same_tensors(dense_model(NAME, tmp_path / "w.pth", 3).state_dict(), state)
    assert key in capsys.readouterr().err


def test_objects_next_to_the_weights_are_not_made_and_nothing_is_allowed_for_good(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "best": np.float64(0.5)}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    assert type(torch_checkpoint.load_plain(tmp_path / "w.pth")["best"]) is torch_checkpoint.Inert
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("pickled", ["torch", "plain", "model"])
def test_code_in_a_checkpoint_is_not_run_and_its_object_is_named(tmp_path, pickled):
    content = {"weight": torch.zeros(2), "best": np.float64(0), "bomb": Bomb(tmp_path / "exploded")}
    for name in ("w.pth", "w"):
        if pickled == "plain":
            (tmp_path / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(timm.create_model(NAME) if pickled == "model" else content, tmp_path / name)
        words = "" if pickled == "plain" else r" \(\S+\)"
        with pytest.raises(ArtifactError, match=rf"{name} .*more than plain tensors{words}"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {1: torch.zeros(2)}, {"a": "text"}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"^weights: [^\n]*w\.pth[^\n]*$"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_missing_and_damaged_files_are_refused_by_name(state, tmp_path, name):
    for length in (None, 11, 20000):
        if length:
            write(state, tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:length])
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            dense_model(NAME, tmp_path / name, num_classes=3)


@pytest.mark.parametrize(("suffix", "prefix"), [(".pth", "module."), (".safetensors", "")])
def test_counters_of_profilers_are_left_out_and_reported_once(state, tmp_path, suffix, prefix, capsys):
    more = {f"{place}{name}": torch.zeros(1) for place in ("", "blocks.0.") for name in ("total_ops", "total_params")}
    given = {prefix + name: tensor for name, tensor in (state | more | {"mask_token": torch.zeros(1, 64)}).items()}
    assert same_tensors(dense_model(NAME, write(given, tmp_path / f"w{suffix}"), 3).state_dict(), state)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "and 2 more" in said[0]


def test_a_resampled_tensor_is_told(state, tmp_path, capsys):
    larger = timm.create_model(NAME, num_classes=3, **LARGER).state_dict()
    model = dense_model(NAME, write({f"module.{k}": v for k, v in larger.items()}, tmp_path / "w.safetensors"), 3)
    assert model.pos_embed.shape == state["pos_embed"].shape
    assert "pos_embed" in capsys.readouterr().err


# ---- strictness -------------------------------------------------------------------------------------------------

POS, BIAS = "pos_embed", "norm.bias"
WRONG = {
    "missing": {BIAS: None},
    "unknown": {"extra": torch.zeros(1)},
    "lines in a name": {"a\nb\u2028c": torch.zeros(1)},
    "wrong shape": {BIAS: torch.zeros(3)},
    "integers": {BIAS: torch.zeros(64, dtype=torch.int64)},
    "NaN": {BIAS: torch.full((64,), float("nan"))},
    "sparse": {BIAS: torch.zeros(64).to_sparse()},
    "without numbers": {BIAS: torch.zeros(64, device="meta")},
    "there twice": {f"module.{BIAS}": torch.ones(64)},
    # of another shape, so that timm would resample them
    "positions that are no square": {POS: torch.zeros(1, 8, 64)},
    "positions of whole numbers": {POS: torch.zeros(1, 197, 64, dtype=torch.int64)},
    "positions that are NaN": {POS: torch.full((1, 197, 64), float("nan"))},
    "sparse positions": {POS: torch.zeros(1, 197, 64).to_sparse()},
    "one number for 10^8 positions": {POS: torch.zeros(1, 1, 1).expand(1, 1 + 10**8, 64)},
    "an empty tensor": {POS: torch.zeros(1, 0, 64)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(state, tmp_path, wrong):
    changed = {name: tensor for name, tensor in (state | WRONG[wrong]).items() if tensor is not None}
    torch.save(changed, tmp_path / "w.pth")
    name = next(iter(WRONG[wrong])).removeprefix("module.")
    name = name if name.isprintable() and name != POS else ""
    with pytest.raises(ArtifactError, match=rf"w\.pth.*{name}") as caught:
        dense_model(NAME, tmp_path / "w.pth", 3)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("classes", [0, 5, None])
def test_another_head_names_the_way_out(state, tmp_path, classes):
    with pytest.raises(ArtifactError, match=rf"head\..*{classes or 1000 if classes != 0 else ''}.*--num-classes"):
        dense_model(NAME, write(state, tmp_path / "w.pth"), classes)


def test_a_checkpoint_without_a_head_names_the_way_out(state, tmp_path):
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    path = write(bare, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="num_classes=0"):
        dense_model(NAME, path, 3)
    assert same_tensors(dense_model(NAME, path, 0).state_dict(), bare)


def test_torchvisions_names_with_prefixes_and_counters(tmp_path, monkeypatch, capsys):
    made = architectures.make(architectures.TORCHVISION)
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: made)
    more = {f"module.{k}": v for k, v in made.state_dict().items()} | {"module.total_ops": torch.zeros(1)}
    model = dense_model("vit_b_16", write(more, tmp_path / "w.pth"), made.heads.head.out_features)
    assert torch.equal(model.head.weight, made.heads.head.weight)
    assert "total_ops" in capsys.readouterr().err
