"""Saved and read back unchanged, or refused with a sentence; a folder is written completely or not at all."""

import copy
import errno
import json
from itertools import product

import pytest
import timm
import torch
from children import content, done
from helpers import (
    LOADERS,
    MIXED,
    change_weights,
    copy_of,
    enliven,
    make_batches,
    make_images,
    make_model,
    make_net,
    older,
    same_tensors,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import stratavit
from stratavit import ArtifactError, SuperNet
from stratavit.artifacts import folder_format, timm_config
from stratavit.files import atomic, folders

IMAGES = make_images(2, seed=9)
FILES = ["model.safetensors", "moments.safetensors", "stratavit.json"]
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


def assert_same_tensors(one: nn.Module, other: nn.Module):
    assert same_tensors(one.state_dict(), other.state_dict())


# ---- round trips ----------------------------------------------------------------------------------------


def same_bits(root, threads):
    torch.set_num_threads(threads)
    for folder in sorted(root.iterdir()):
        known = load_file(folder / "known.safetensors")
        net, small = SuperNet.load(folder / "run"), stratavit.load(folder / "small")
        with torch.inference_mode():
            images = known["images"]
            for name, found in (
                ("full", net(images)),
                ("half", net(images, net.spec(macs=0.5))),
                ("small", small(images)),
            ):
                assert torch.equal(found, known[name]), (folder.name, name)


def test_another_process_gives_the_same_bits(tmp_path):
    images = make_images(4, seed=2)
    for family, method in product(("plain", "distilled"), ("default", "paper")):
        folder, net = tmp_path / f"{family}-{method}", make_net(family, method, stratified=True)
        net.save(folder / "run")
        small = net.extract(macs=0.5, verbose=False)
        stratavit.save(small, folder / "small")
        with torch.inference_mode():
            known = {"full": net(images), "half": net(images, net.spec(macs=0.5)), "small": small(images)}
        save_file({"images": images, **known}, folder / "known.safetensors")
    done(same_bits, tmp_path, torch.get_num_threads())


@pytest.mark.parametrize("method", ["default", "paper"])
def test_super_network_round_trip_is_bit_identical(family, method, tmp_path):
    net = make_net(family, method, stratified=True)
    net.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [timm_config.FILE, *FILES]
    read = SuperNet.load(tmp_path / "run")
    assert_same_tensors(read.model, net.model)
    assert type(read.model) is type(net.model)
    assert read.strata.entries == net.strata.entries
    assert (read.method, read.data_config, read.provenance) == (net.method, net.data_config, net.provenance)
    assert (read.sites, read.macs(), read.params(MIXED)) == (net.sites, net.macs(), net.params(MIXED))
    assert (read.final_mean is None) == (method == "paper" or family == "distilled") == (net.final_mean is None)
    if net.final_mean is not None:
        assert read.final_mean.shares == net.final_mean.shares
        assert torch.equal(read.final_mean.vectors, net.final_mean.vectors)
    for name, module in net.elastic.items():
        found = read.elastic[name]
        assert torch.equal(found.channel_mean, module.channel_mean)
        assert (found.moments is None) == (method == "paper") == (module.moments is None)
        if module.moments is not None:
            assert torch.equal(found.moments.factor, module.moments.factor)
            assert (found.moments.ridge, found.moments.energy) == (module.moments.ridge, module.moments.energy)
    with torch.no_grad():
        for spec in (None, MIXED):
            assert torch.equal(read(IMAGES, spec), net(IMAGES, spec))
            assert torch.equal(read.extract(spec=spec or {})(IMAGES), net.extract(spec=spec or {})(IMAGES))


@pytest.mark.parametrize("method", ["default", "paper"])
@pytest.mark.parametrize("widths", [{}, MIXED, dict.fromkeys(MIXED, 0)], ids=["full", "mixed", "nothing"])
def test_sub_network_round_trip_is_bit_identical(family, method, widths, tmp_path):
    small = make_net(family, method).extract(spec=widths)
    stratavit.save(small, tmp_path / "small")
    read = stratavit.load(tmp_path / "small")
    assert_same_tensors(read, small)
    assert str(read) == str(small)
    assert not read.training
    assert (read.provenance, read.data_config) == (small.provenance, small.data_config)
    with torch.no_grad():
        assert torch.equal(read(IMAGES), small(IMAGES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_the_type(dtype, tmp_path):
    net = SuperNet(make_model("plain", dtype=dtype)).contract(make_batches())
    net.save(tmp_path / "run")
    assert_same_tensors(SuperNet.load(tmp_path / "run").model, net.model)
    stratavit.save(net.extract(spec=MIXED), tmp_path / "small")
    assert_same_tensors(stratavit.load(tmp_path / "small"), net.extract(spec=MIXED))


def test_a_super_network_can_be_saved_at_any_stage_and_converted_further(tmp_path):
    """Before any calibration: no list, no moments."""
    SuperNet(make_model("plain")).save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    assert read.strata is None
    assert read.elastic["blocks.0.attn"].channel_mean.numel() == 0
    read.contract(make_batches()).stratify(make_batches()).save(tmp_path / "run", overwrite=True)
    assert SuperNet.load(tmp_path / "run").strata is not None


def test_sub_network_can_be_cut_again(saved):
    """A loaded small model is a timm model like any other, where no width is 0."""
    net = make_net("plain")
    stratavit.save(net.extract(spec={"blocks.0.attn": 8, "blocks.1.mlp": 40}), saved / "smaller")
    again = SuperNet(stratavit.load(saved / "smaller"))
    assert [site.width for site in again.sites] == [8, 64, 16, 40]


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg", "init_values": 0.1, "reg_tokens": 2, "qkv_bias": False}])
def test_super_network_file_is_an_ordinary_checkpoint(kwargs, tmp_path):
    """Loads strictly into what `timm.create_model` makes, with no code of ours, and returns the same outputs."""
    source = enliven(timm.create_model("vit_tiny_patch16_224", **KWARGS, **kwargs)).eval()
    net = SuperNet(source).contract(make_batches())
    net.save(tmp_path / "run")
    plain = timm.create_model("vit_tiny_patch16_224", **KWARGS, **kwargs).eval()
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), net(IMAGES))


def test_a_foreign_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ArtifactError, match="ResNet"):
        stratavit.save(timm.create_model("resnet10t"), tmp_path / "out")
    with pytest.raises(ArtifactError, match="super-network: save it with its own save"):
        stratavit.save(make_net("plain"), tmp_path / "out")
    altered = make_model("plain")
    altered.blocks[0].norm1 = nn.BatchNorm1d(32)
    with pytest.raises(ArtifactError, match=r"blocks\.0\.norm1"):
        stratavit.save(altered, tmp_path / "out")
    assert content(tmp_path) == {}


# ---- the wrong folder, damaged files ---------------------------------------------------------------------


def test_each_loader_names_the_other(saved):
    with pytest.raises(ArtifactError, match=r"super-network: load it with SuperNet\.load"):
        stratavit.load(saved / "super")
    with pytest.raises(ArtifactError, match=r"sub-network: load it with stratavit\.load"):
        SuperNet.load(saved / "small")


@pytest.mark.parametrize("kind", LOADERS)
def test_folders_that_are_not_ours(saved, kind):
    (saved / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"not a folder saved by StrataViT.*stratavit\.json is missing"):
        LOADERS[kind](saved / "empty")
    for path in (saved / "none", saved / kind / "stratavit.json"):
        with pytest.raises(ArtifactError, match="is not a folder"):
            LOADERS[kind](path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_files_are_refused_by_name(root, tmp_path, damage):
    for kind, file in [*product(["super"], FILES), ("small", FILES[0]), ("small", FILES[2])]:
        folder = copy_of(root / kind, tmp_path / f"{kind} {file}")
        original = (folder / file).read_bytes()
        (folder / file).unlink()
        if damage == "truncated":
            (folder / file).write_bytes(original[: len(original) // 2])
        with pytest.raises(ArtifactError, match=file.replace(".", r"\.")):
            LOADERS[kind](folder)


def edit_tensors(path, changes):
    """Replaces tensors of a file, or removes those of None."""
    tensors = load_file(path)
    save_file({name: value for name, value in (tensors | changes).items() if value is not None}, path)
    older(path.parent)


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_that_do_not_fit_are_refused_by_name(saved, kind):
    edit_tensors(saved / kind / "model.safetensors", {"head.weight": torch.zeros(9, 32)})
    with pytest.raises(ArtifactError, match=r"head\.weight.*\(9, 32\).*\(7, 32\).*--num-classes"):
        LOADERS[kind](saved / kind)


MEAN, FACTOR, SCALARS = "blocks.0.attn.mean", "blocks.0.mlp.factor", "blocks.1.attn.scalars"
MOMENTS = {  # each is refused by the name of its last tensor
    "mean of another shape": {MEAN: torch.zeros(3, 5)},
    "mean NaN": {MEAN: torch.full((2, 16), float("nan"))},
    "mean finite in the file only": {MEAN: torch.full((2, 16), 1e300, dtype=torch.float64)},
    "mean missing": {MEAN: None},
    "mean of integers": {MEAN: torch.zeros(2, 16, dtype=torch.int32)},
    "renamed": {FACTOR: None, "blocks.0.mlp.factoR": torch.ones(2080)},
    "factor missing": {FACTOR: None},
    "factor of another size": {FACTOR: torch.ones(5)},
    "factor of another type": {FACTOR: torch.ones(2080).half()},
    "factor not finite": {FACTOR: torch.full((2080,), float("inf"))},
    "factor not positive": {FACTOR: torch.zeros(2080)},
    "scalars missing": {SCALARS: None},
    "scalars negative": {SCALARS: torch.tensor([-1.0, 2.0])},
    "vectors of another width": {"final_mean.vectors": torch.zeros(2, 5)},
    "vectors finite in the file only": {"final_mean.vectors": torch.full((2, 32), 1e300, dtype=torch.float64)},
    "shares missing": {"final_mean.shares": None},
    "shares rising": {"final_mean.shares": torch.tensor([0.3, 0.6]).double()},
    "shares beyond 1": {"final_mean.shares": torch.tensor([1.5, 0.6]).double()},
}


@pytest.mark.parametrize("damage", MOMENTS)
def test_moments_that_do_not_fit_are_refused_by_name(saved, damage):
    name = "final_mean" if "final" in [*MOMENTS[damage]][-1] else [*MOMENTS[damage]][-1]
    edit_tensors(saved / "super" / "moments.safetensors", MOMENTS[damage])
    with pytest.raises(ArtifactError, match=rf"moments\.safetensors: {name}"):
        SuperNet.load(saved / "super")


@pytest.mark.parametrize("tensor", [None, torch.zeros(5), torch.full((32,), float("nan"))])
def test_changes_of_weights_that_do_not_fit_are_refused_by_name(tmp_path, tensor):
    net, name = copy.deepcopy(make_net("plain")), "blocks.0.mlp.delta.out_bias"
    change_weights(net)
    net.save(tmp_path / "run")
    edit_tensors(tmp_path / "run" / "moments.safetensors", {name: tensor})
    with pytest.raises(ArtifactError, match=name):
        SuperNet.load(tmp_path / "run")


@pytest.mark.parametrize("compensation", ["none", "mean", "full"])
def test_compensation_is_kept(compensation, tmp_path):
    net = copy.deepcopy(make_net("plain", stratified=True))
    net.compensation = compensation
    net.save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    assert read.compensation == compensation
    with torch.no_grad():
        assert torch.equal(read(IMAGES, MIXED), net(IMAGES, MIXED))


def test_without_second_moments_what_is_cut_is_replaced_by_its_mean(tmp_path):
    net = copy.deepcopy(make_net("plain", stratified=True))
    net.save(tmp_path / "whole")
    net.save(tmp_path / "less", moments=False)
    sizes = [(tmp_path / name / "moments.safetensors").stat().st_size for name in ("less", "whole")]
    assert sizes[0] < sizes[1] / 3
    assert folder_format.moments_bytes(tmp_path / "less") == sizes[0]
    read = SuperNet.load(tmp_path / "less")
    assert all(module.moments is None for module in read.elastic.values())
    assert read.final_mean is None
    net.compensation = "mean"
    with torch.no_grad():
        assert torch.equal(read(IMAGES, MIXED), net(IMAGES, MIXED))
        assert torch.equal(read.extract(spec=MIXED)(IMAGES), net.extract(spec=MIXED)(IMAGES))


def test_other_format_versions_are_refused(saved):
    for kind, load in LOADERS.items():
        older(saved / kind, lambda content: content.update(format_version=2))
        with pytest.raises(ArtifactError, match=r"format version 2 "):
            load(saved / kind)


# ---- writing whole or not at all --------------------------------------------------------------------------


def save(path, **options):
    stratavit.save(make_net("plain").extract(spec=MIXED, verbose=False), path, **options)


def test_a_folder_that_is_not_empty_is_kept_unless_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ArtifactError, match=r"out is not empty.*--overwrite"):
        save(tmp_path / "out")
    assert content(tmp_path) == before
    save(tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {timm_config.FILE, FILES[0], FILES[2]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_and_new_parents_are_fine_and_a_file_in_the_way_is_kept(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b", str(tmp_path / "text")):
        save(path)
        stratavit.load(path)
    (tmp_path / "out").write_text("mine")
    for path, overwrite in product((tmp_path / "out", tmp_path / "out" / "below"), (False, True)):
        with pytest.raises(ArtifactError, match="out is a file"):
            save(path, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


FAILURES = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "full, says safetensors": SafetensorError("Error while serializing: No space left on device (os error 28)"),
    "interrupted": KeyboardInterrupt(),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("function", "old"), [("save_file", False), ("write_json", True)])
def test_a_failed_write_leaves_nothing_and_keeps_the_old(failure, function, old, root, tmp_path, monkeypatch):
    if old:
        copy_of(root / "super", tmp_path / "new" / "out")
    before, error = content(tmp_path), FAILURES[failure]

    def fail_half_way(*args, **kwargs):
        path = next(argument for argument in args if hasattr(argument, "write_bytes"))
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(folder_format, function, fail_half_way)
    expected = KeyboardInterrupt if failure == "interrupted" else ArtifactError
    with pytest.raises(expected, match=None if failure == "interrupted" else "new/out: .*No space left"):
        save(tmp_path / "new" / "out", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("swaps", [True, False])
def test_a_failed_exchange_keeps_the_old(root, tmp_path, monkeypatch, swaps):
    """The new folder is written but cannot be moved into place, in one step or in two."""
    copy_of(root / "super", tmp_path / "out")
    before, rename = content(tmp_path), folders.Path.rename

    def fail(*args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic, "_exchanged", fail if swaps else lambda *args: False)
    monkeypatch.setattr(folders.Path, "rename", lambda self, to: (fail if self.name == "new" else rename)(self, to))
    with pytest.raises(ArtifactError, match="Permission denied"):
        save(tmp_path / "out", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("said", "kind"), [("(os error 12)", MemoryError), ("(os error 123)", ArtifactError)])
def test_errors_of_the_system_that_safetensors_passes_on(root, monkeypatch, said, kind):
    def fail(path):
        raise SafetensorError(f"Error while reading: {said}")

    monkeypatch.setattr(folders, "load_file", fail)
    with pytest.raises(kind):
        folders.read_tensors(root / "super" / FILES[1])


def test_the_makers_of_a_folder_are_named(root):
    found = json.loads((root / "super" / "stratavit.json").read_text())
    assert (found["format"], found["format_version"]) == ("stratavit/super-network", 1)
    assert found["versions"].keys() == {"stratavit", "timm", "torch"}


@pytest.mark.real_weights
def test_real_deit_tiny_round_trip_through_timm(deit_tiny, tmp_path):
    """Converted, saved, and loaded strictly by plain timm; the half-size model is read back bit-identical."""
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    net = SuperNet(deit_tiny).contract([images])
    net.save(tmp_path / "run")
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    small = net.extract(spec={site.name: site.width // 2 for site in net.sites}, verbose=False)
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(plain(images), net(images))
        assert (plain(images) - deit_tiny(images)).abs().max() <= 1e-4
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))
