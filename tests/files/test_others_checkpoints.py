"""Checkpoints that other tools wrote load as timm loads them, or are refused; what is left out is said."""

import argparse
import pathlib

import numpy as np
import pytest
import timm
import torch
from helpers import enliven
from safetensors.torch import save_file

from stratavit import ArtifactError
from stratavit.artifacts.model_loading import dense_model
from stratavit.files import torch_checkpoint
from stratavit.files.state_dicts import load_weights
from stratavit.files.torch_checkpoint import read_checkpoint
from stratavit.interop.timm_filter import fitted

NAME = "test_vit"
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


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- as timm does -----------------------------------------------------------------------------------------------

VIT = {"depth": 1, "num_classes": 3}
AS_TIMM = [
    (NAME, {"num_classes": 3}, LARGER),
    ("vit_tiny_patch16_224", VIT, {"img_size": 384}),
    ("vit_tiny_patch16_224", VIT, {"img_size": (160, 160)}),
    ("vit_tiny_patch16_224", VIT, {"patch_size": 32}),
    ("vit_small_patch14_reg4_dinov2", VIT | {"img_size": 56}, {"img_size": 112}),
    ("deit3_small_patch16_224", VIT, {"img_size": 384}),
    ("deit_tiny_distilled_patch16_224", VIT, {"img_size": 384}),
    ("flexivit_small", VIT, {"img_size": 320}),
    ("vit_base_patch16_radio_v3", VIT | {"embed_dim": 64, "num_heads": 2, "img_size": 64}, {"img_size": 96}),
    ("eva02_tiny_patch14_224", VIT, {"img_size": 336}),
    ("beit_base_patch16_224", VIT | {"embed_dim": 64, "num_heads": 2}, {"img_size": 384}),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "num_classes": 3}, {"window_size": 8, "img_size": 256}),
    ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "num_classes": 3}, {}),
    ("regnety_002", {"num_classes": 3}, {}),
    ("resnet10t", {"num_classes": 3}, {}),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), AS_TIMM)
def test_what_is_loaded_is_what_timm_loads(name, ours, theirs):
    given = enliven(timm.create_model(name, **ours | theirs)).state_dict()
    overlay = {"state_dict": dict(given), "num_classes": 3}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **ours).state_dict()
    model = timm.create_model(name, **ours)
    load_weights(model, fitted(name, model, given, "file"), "file")
    assert same(model.state_dict(), expected)


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
    assert same(found, model.state_dict())
    assert capsys.readouterr().err == ""  # buffers that the model makes itself


def test_deit_3_in_metas_own_names():
    name = "deit3_small_patch16_224"
    model = enliven(timm.create_model(name, depth=1, num_classes=3))
    given = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in model.state_dict().items()
    }
    assert "blocks.0.gamma_1" in given
    assert same(fitted(name, model, given, "file"), model.state_dict())


def test_dinov2s_own_file_with_registers(capsys):
    name = "vit_small_patch14_reg4_dinov2"
    model = enliven(timm.create_model(name, depth=1, img_size=56))
    own = model.state_dict()
    given = {k: v for k, v in own.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    given |= {"register_tokens": own["reg_token"], "mask_token": torch.zeros(1, 384), "cls_token": own["cls_token"]}
    given["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), own["pos_embed"]], dim=1)
    assert same(fitted(name, model, given, "file"), own)
    assert "left out mask_token, " in capsys.readouterr().err


# ---- wrappers, nests, company -----------------------------------------------------------------------------------

PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod."]
PREFIXES += ["module.model.", "_fsdp_wrapped_module.", "model.module._orig_mod."]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_wrappers(state, tmp_path, suffix, capsys):
    for prefix in PREFIXES:
        path = write({prefix + name: tensor for name, tensor in state.items()}, tmp_path / f"w{suffix}")
        assert same(dense_model(NAME, path, 3).state_dict(), state), prefix
    assert capsys.readouterr().err == ""


def test_blocks_that_were_compiled_one_by_one(state, tmp_path):
    given = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state.items()}
    assert same(dense_model(NAME, write(given, tmp_path / "w.safetensors"), 3).state_dict(), state)


def test_a_prefix_that_brings_two_tensors_to_one_name(state, tmp_path):
    given = state | {"module.head.bias": torch.ones(3)}
    with pytest.raises(ArtifactError, match=r"head\.bias"):
        dense_model(NAME, write(given, tmp_path / "w.pth"), 3)


NESTS = {
    "state_dict": lambda s: {"state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "model in module": lambda s: {"model": {"module": s}},
    "state_dict in model": lambda s: {"model": {"state_dict": s}},
    "averaged": lambda s: {"model_ema": s, "epoch": 1},
    "no averages": lambda s: {"state_dict_ema": None, "state_dict": s},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "pytorch-lightning_version": "2"},
    "numpy number": lambda s: {"state_dict": s, "best_acc": np.float64(0.5), "n": np.int64(3)},
    "numpy number in 32 bits": lambda s: {"model": s, "best": {"top1": np.float32(1)}},
    "numpy array": lambda s: {"state_dict": s, "confusion": np.eye(3)},
    "arguments": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=np.float64(1), out=pathlib.Path("a"))},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("nest", NESTS)
def test_weights_in_company(state, tmp_path, nest, old, capsys):
    torch.save(NESTS[nest](state), tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    assert same(dense_model(NAME, tmp_path / "w.pth", 3).state_dict(), state)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_used_as_timm_does_and_reported(state, tmp_path, key, capsys):
    torch.save({"state_dict": {name: tensor + 1 for name, tensor in state.items()}, key: state}, tmp_path / "w.pth")
    assert same(dense_model(NAME, tmp_path / "w.pth", 3).state_dict(), state)
    assert key in capsys.readouterr().err


def test_objects_next_to_the_weights_are_not_made_and_nothing_is_allowed_for_good(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "best": np.float64(0.5)}, tmp_path / "w.pth")
    before = set(torch.serialization.get_safe_globals())
    assert type(torch_checkpoint.load_plain(tmp_path / "w.pth")["best"]) is torch_checkpoint.Inert
    assert set(torch.serialization.get_safe_globals()) == before


class Other:
    """Not allowed."""


def test_an_object_that_is_in_the_way_is_named(state, tmp_path):
    torch.save({"state_dict": state, "best": np.float64(0), "x": Other()}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=rf"{__name__}\.Other"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(("suffix", "prefix"), [(".pth", "module."), (".safetensors", "")])
def test_counters_of_profilers_are_left_out_and_reported_once(state, tmp_path, suffix, prefix, capsys):
    more = {f"{place}{name}": torch.zeros(1) for place in ("", "blocks.0.") for name in ("total_ops", "total_params")}
    given = {prefix + name: tensor for name, tensor in (state | more | {"mask_token": torch.zeros(1, 64)}).items()}
    assert same(dense_model(NAME, write(given, tmp_path / f"w{suffix}"), 3).state_dict(), state)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "and 2 more" in said[0]


def test_a_resampled_tensor_is_told(state, tmp_path, capsys):
    larger = timm.create_model(NAME, num_classes=3, **LARGER).state_dict()
    model = dense_model(NAME, write({f"module.{k}": v for k, v in larger.items()}, tmp_path / "w.safetensors"), 3)
    assert model.pos_embed.shape == state["pos_embed"].shape
    assert "pos_embed" in capsys.readouterr().err


# ---- strictness -------------------------------------------------------------------------------------------------

WRONG = {
    "missing": lambda s: {k: v for k, v in s.items() if k != "blocks.0.norm1.bias"},
    "unknown": lambda s: s | {"extra": torch.zeros(1)},
    "wrong shape": lambda s: s | {"blocks.0.norm1.bias": torch.zeros(3)},
    "positions that are no square": lambda s: s | {"pos_embed": torch.zeros(1, 8, 64)},
    "positions of whole numbers": lambda s: s | {"pos_embed": torch.zeros(1, 197, 64, dtype=torch.int64)},
    "positions that are NaN": lambda s: s | {"pos_embed": torch.full((1, 197, 64), float("nan"))},
    "sparse positions": lambda s: s | {"pos_embed": torch.zeros(1, 197, 64).to_sparse()},
    "positions without numbers": lambda s: s | {"pos_embed": torch.zeros(1, 197, 64, device="meta")},
    "one number for 10^9 positions": lambda s: s | {"pos_embed": torch.zeros(1, 1, 1).expand(1, 1 + 10**8, 64)},
    "an empty tensor": lambda s: s | {"pos_embed": torch.zeros(1, 0, 64)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(state, tmp_path, wrong):
    torch.save(WRONG[wrong](dict(state)), tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"w\.pth") as caught:
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
    assert same(dense_model(NAME, path, 0).state_dict(), bare)


def test_torchvisions_names_with_prefixes_and_counters(tmp_path, capsys):
    torchvision = pytest.importorskip("torchvision")
    given = torchvision.models.vit_b_32(num_classes=3).state_dict()
    more = given | {"total_ops": torch.zeros(1)}
    model = dense_model("vit_b_32", write({f"module.{k}": v for k, v in more.items()}, tmp_path / "w.pth"), 3)
    assert torch.equal(model.head.weight, given["heads.head.weight"])
    assert "total_ops" in capsys.readouterr().err
