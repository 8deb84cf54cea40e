"""Saved and read back unchanged, or refused with a sentence; a folder is written whole or not at all."""

import copy
import errno
import json
import shutil
import stat
import subprocess
import sys
from itertools import product

import pytest
import timm
import torch
from helpers import FAMILIES, enliven, make_batches, make_images, make_model, make_net
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.artifacts import folder_format, moments, super_network, timm_config
from stratavit.files import atomic, folders

IMAGES = make_images(2, seed=9)
MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}
FILES = ["model.safetensors", "moments.safetensors", "stratavit.json"]
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
LOADERS = {"super": SuperNet.load, "small": stratavit.load}


@pytest.fixture
def saved(tmp_path):
    """Folders of a super-network and of a sub-network."""
    net = make_net("plain", stratified=True)
    net.save(tmp_path / "super")
    stratavit.save(net.extract(spec=MIXED), tmp_path / "small")
    return tmp_path


def content(folder):
    """Everything under a folder: path -> bytes, None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder): None if path.is_dir() else path.read_bytes() for path in paths}


def assert_same_tensors(one: nn.Module, other: nn.Module):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


# ---- round trips ----------------------------------------------------------------------------------------


ELSEWHERE = """
import sys, torch, stratavit
from pathlib import Path
from safetensors.torch import load_file

torch.set_num_threads(int(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    known = load_file(folder / "known.safetensors")
    net, small = stratavit.SuperNet.load(folder / "run"), stratavit.load(folder / "small")
    with torch.inference_mode():
        images = known["images"]
        found = {"full": net(images), "half": net(images, net.spec(macs=0.5)), "small": small(images)}
    wrong = [name for name in found if not torch.equal(found[name], known[name])]
    print(folder.name, wrong)
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    images = make_images(4, seed=2)
    for family, method in product(FAMILIES, ("default", "paper")):
        folder, net = tmp_path / f"{family}-{method}", make_net(family, method, stratified=True)
        net.save(folder / "run")
        small = net.extract(macs=0.5, verbose=False)
        stratavit.save(small, folder / "small")
        with torch.inference_mode():
            known = {"full": net(images), "half": net(images, net.spec(macs=0.5)), "small": small(images)}
        save_file({"images": images, **known}, folder / "known.safetensors")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(FAMILIES)
    assert all(line.endswith(" []") for line in lines), done.stdout


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
    for name, module in net.elastic.items():
        assert torch.equal(read.elastic[name].channel_mean, module.channel_mean)
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


def test_fresh_super_network_can_be_saved(tmp_path):
    """Before any calibration: no list, no moments."""
    SuperNet(make_model("plain")).save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    assert read.strata is None
    assert read.elastic["blocks.0.attn"].channel_mean.numel() == 0


def test_loaded_super_network_can_be_converted_further(saved):
    read = SuperNet.load(saved / "super")
    read.contract(make_batches()).stratify(make_batches()).save(saved / "again")
    assert SuperNet.load(saved / "again").strata is not None


def test_sub_network_can_be_cut_again(saved):
    """A loaded small model is a timm model like any other, where no width is 0."""
    net = make_net("plain")
    stratavit.save(net.extract(spec={"blocks.0.attn": 8, "blocks.1.mlp": 40}), saved / "smaller")
    again = SuperNet(stratavit.load(saved / "smaller"))
    assert [site.width for site in again.sites] == [8, 64, 16, 40]


@pytest.mark.parametrize(
    "kwargs", [{}, {"global_pool": "avg"}, {"init_values": 0.1}, {"reg_tokens": 2}, {"qkv_bias": False}]
)
def test_super_network_file_is_an_ordinary_checkpoint(kwargs, tmp_path):
    """Loads strictly into what `timm.create_model` makes, with no code of ours, and gives the same answers."""
    source = enliven(timm.create_model("vit_tiny_patch16_224", **KWARGS, **kwargs)).eval()
    net = SuperNet(source).contract(make_batches())
    net.save(tmp_path / "run")
    plain = timm.create_model("vit_tiny_patch16_224", **KWARGS, **kwargs).eval()
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), net(IMAGES))
    from_file = timm.create_model(
        "vit_tiny_patch16_224", **KWARGS, **kwargs, checkpoint_path=str(tmp_path / "run" / "model.safetensors")
    ).eval()
    with torch.no_grad():
        assert torch.equal(from_file(IMAGES), net(IMAGES))


def test_json_names_format_version_and_makers(saved):
    for folder, kind in (("super", "super-network"), ("small", "sub-network")):
        header = json.loads((saved / folder / "stratavit.json").read_text())
        assert header["format"] == f"stratavit/{kind}"
        assert header["format_version"] == 1
        assert header["versions"].keys() == {"stratavit", "timm", "torch"}


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


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_header(path):
    path.write_bytes(b"\xff" * 20 + path.read_bytes()[20:])


DAMAGES = {"missing": lambda path: path.unlink(), "truncated": truncate, "corrupt": damage_header}
DAMAGES |= {"empty": lambda path: path.write_bytes(b""), "folder": lambda path: (path.unlink(), path.mkdir())}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("kind", "file"), [("super", f) for f in FILES] + [("small", f) for f in FILES if not f.startswith("moments")]
)
def test_damaged_files_are_refused_by_name(saved, kind, file, damage):
    DAMAGES[damage](saved / kind / file)
    with pytest.raises(ArtifactError, match=file.replace(".", r"\.")) as caught:
        LOADERS[kind](saved / kind)
    assert "\n" not in str(caught.value)


def without_hashes(folder):
    """As a folder of an older release: what was changed is then found by what it says."""
    path = folder / "stratavit.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "hashes"}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    without_hashes(path.parent)


EDITS = {
    "missing": (lambda t: t.pop("norm.bias"), r"norm\.bias is missing"),
    "unknown": (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of the model"),
    "wrong head": (
        lambda t: t.update({"head.weight": torch.zeros(9, 32)}),
        r"head\.weight.*\(9, 32\).*\(7, 32\).*--num-classes",
    ),
    "wrong width": (lambda t: t.update({"norm.weight": torch.zeros(9)}), r"norm\.weight has shape \(9,\)"),
    "NaN": (lambda t: t["norm.weight"].fill_(float("nan")), r"norm\.weight holds NaN"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("edit", EDITS)
def test_weights_that_do_not_fit_are_refused_by_name(saved, kind, edit):
    edit_tensors(saved / kind / "model.safetensors", EDITS[edit][0])
    with pytest.raises(ArtifactError, match=EDITS[edit][1]):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("value", [torch.zeros(3, 5), torch.full((2, 16), float("nan")), torch.zeros(32)])
def test_moments_that_do_not_fit_are_refused_by_name(saved, value):
    edit_tensors(saved / "super" / "moments.safetensors", lambda tensors: tensors.update({"blocks.0.attn.mean": value}))
    with pytest.raises(ArtifactError, match=r"moments\.safetensors: the mean of blocks\.0\.attn .* 2 x 16 finite"):
        SuperNet.load(saved / "super")


SECOND = {
    "factor of another size": ({"blocks.0.mlp.factor": torch.ones(5)}, r"factor of blocks\.0\.mlp .* 64 x 64"),
    "factor of another type": ({"blocks.0.mlp.factor": torch.ones(2080).half()}, r"factor of blocks\.0\.mlp"),
    "factor not finite": ({"blocks.0.mlp.factor": torch.full((2080,), float("inf"))}, r"factor of blocks\.0\.mlp"),
    "factor not positive": ({"blocks.0.mlp.factor": torch.zeros(2080)}, r"factor of blocks\.0\.mlp"),
    "scalars missing": ({"blocks.1.attn.scalars": None}, r"scalars of blocks\.1\.attn"),
    "scalars negative": ({"blocks.1.attn.scalars": torch.tensor([-1.0, 2.0])}, r"scalars of blocks\.1\.attn"),
    "mean missing": ({"blocks.1.attn.mean": None}, r"the mean of blocks\.1\.attn is missing"),
    "vectors of another width": ({"final_mean.vectors": torch.zeros(2, 5)}, "final mean"),
    "shares missing": ({"final_mean.shares": None}, "final mean"),
    "shares rising": ({"final_mean.shares": torch.tensor([0.3, 0.6]).double()}, "final mean"),
    "shares beyond 1": ({"final_mean.shares": torch.tensor([1.5, 0.6]).double()}, "final mean"),
}


@pytest.mark.parametrize("damage", SECOND)
def test_second_moments_and_final_mean_that_do_not_fit_are_refused_by_name(saved, damage):
    changes, message = SECOND[damage]

    def edit(tensors):
        for name, value in changes.items():
            assert name in tensors
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value

    edit_tensors(saved / "super" / "moments.safetensors", edit)
    with pytest.raises(ArtifactError, match=rf"moments\.safetensors: .*{message}"):
        SuperNet.load(saved / "super")


def test_second_moments_and_final_mean_come_back_bit_identical(family, tmp_path):
    net = make_net(family, stratified=True)
    net.save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    for name, module in net.elastic.items():
        found = read.elastic[name].moments
        assert torch.equal(found.factor, module.moments.factor)
        assert (found.ridge, found.energy) == (module.moments.ridge, module.moments.energy)
    assert (read.final_mean is None) == (net.final_mean is None) == (family == "distilled")
    if net.final_mean is not None:
        assert read.final_mean.shares == net.final_mean.shares
        assert torch.equal(read.final_mean.vectors, net.final_mean.vectors)


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
    assert super_network.moments_bytes(tmp_path / "less") == sizes[0]
    read = SuperNet.load(tmp_path / "less")
    assert all(module.moments is None for module in read.elastic.values())
    assert read.final_mean is None
    net.compensation = "mean"
    with torch.no_grad():
        assert torch.equal(read(IMAGES, MIXED), net(IMAGES, MIXED))
        assert torch.equal(read.extract(spec=MIXED)(IMAGES), net.extract(spec=MIXED)(IMAGES))


@given(st.integers(1, 9))
def test_triangles_are_packed_without_loss(n):
    factor = torch.randn(n, n).tril()
    assert moments.packed(factor).shape == (n * (n + 1) // 2,)
    assert torch.equal(moments.unpacked(moments.packed(factor), n), factor)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_format_versions_are_refused(saved):
    for kind, load in LOADERS.items():
        edit_json(saved / kind / "stratavit.json", format_version=2)
        with pytest.raises(ArtifactError, match=r"format version 2 is not 1.*release"):
            load(saved / kind)


JUNK = [None, 0, "x", [], [1], ["x", "y", "z"], {"a": 1}, True]


def places(value, path=()):
    """Paths of every value inside nested dicts, outermost first."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("kind", LOADERS)
def test_junk_anywhere_in_the_json_is_refused_or_harmless(saved, kind):
    """Whatever stands in the place of a value: our own error, or a model that runs."""
    path = saved / kind / "stratavit.json"
    without_hashes(saved / kind)
    original = json.loads(path.read_text())
    escaped = []
    for place in places(original):
        if (place[0] in ("provenance", "versions") and len(place) > 1) or "blocks.1.attn" in place:
            continue  # told but never used, or like another place
        for junk in JUNK:
            changed = copy.deepcopy(original)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = junk
            path.write_text(json.dumps(changed))
            try:
                with torch.no_grad():
                    LOADERS[kind](saved / kind)(IMAGES)
            except Exception as error:
                if isinstance(error, StrataViTError) and "\n" not in str(error):
                    continue
                escaped.append(f"{'.'.join(place)} = {junk!r}: {type(error).__name__}: {error}")
    assert not escaped, "\n".join(escaped)


def test_loading_runs_no_pickled_code(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for kind, load in LOADERS.items():
        load(saved / kind)


# ---- writing whole or not at all --------------------------------------------------------------------------


def save_super(path, **options):
    make_net("plain", stratified=True).save(path, **options)


def save_small(path, **options):
    stratavit.save(make_net("plain").extract(spec=MIXED), path, **options)


WRITERS = pytest.mark.parametrize("save", [save_super, save_small])


@WRITERS
def test_a_folder_that_is_not_empty_is_kept_unless_asked(save, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ArtifactError, match=r"is not empty.*overwrite"):
        save(tmp_path / "out")
    assert content(tmp_path) == before
    save(tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {timm_config.FILE, *FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@WRITERS
def test_an_empty_folder_and_new_parents_are_fine(save, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b", str(tmp_path / "text")):
        save(path)
    assert "stratavit.json" in {path.name for path in (tmp_path / "a" / "b").iterdir()}


@WRITERS
def test_a_file_in_the_way_is_kept(save, tmp_path):
    (tmp_path / "out").write_text("mine")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        for overwrite in (False, True):
            with pytest.raises(ArtifactError):
                save(path, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


FAILURES = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "disk full, told by safetensors": SafetensorError("Error while serializing: No space left on device (os error 28)"),
    "interrupted": KeyboardInterrupt(),
}


@WRITERS
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("function", ["save_file", "write_json"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_nothing_and_keeps_the_old(save, failure, function, old, tmp_path, monkeypatch):
    if old:
        save_super(tmp_path / "out")
    before, error = content(tmp_path), FAILURES[failure]

    def fail_half_way(*args, **kwargs):
        path = next(argument for argument in args if hasattr(argument, "write_bytes"))
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(folder_format, function, fail_half_way)
    expected = KeyboardInterrupt if failure == "interrupted" else ArtifactError
    with pytest.raises(expected) as caught:
        save(tmp_path / "out", overwrite=True)
    assert content(tmp_path) == before
    if expected is ArtifactError:
        assert "No space left on device" in str(caught.value)
        assert str(tmp_path / "out") in str(caught.value)


def test_a_failed_write_leaves_no_new_parents(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_format, "save_file", lambda *args: (_ for _ in ()).throw(FAILURES["disk full"]))
    with pytest.raises(ArtifactError):
        save_super(tmp_path / "new" / "out")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("swaps", [True, False])
def test_a_failed_exchange_keeps_the_old(tmp_path, monkeypatch, swaps):
    """The new folder is written but cannot be moved into place, in one step or in two."""
    save_super(tmp_path / "out")
    before, rename = content(tmp_path), folders.Path.rename

    def fail(*args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic, "_exchanged", fail if swaps else lambda *args: False)
    monkeypatch.setattr(folders.Path, "rename", lambda self, to: (fail if self.name == "new" else rename)(self, to))
    with pytest.raises(ArtifactError, match="Permission denied"):
        save_small(tmp_path / "out", overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("said", "kind"), [("(os error 12)", MemoryError), ("(os error 123)", ArtifactError)])
def test_errors_of_the_system_that_safetensors_passes_on(saved, monkeypatch, said, kind):
    def fail(path):
        raise SafetensorError(f"Error while reading: {said}")

    monkeypatch.setattr(folders, "load_file", fail)
    with pytest.raises(kind):
        folders.read_tensors(saved / "super" / FILES[1])


def test_numbers_that_json_lacks_are_our_error(tmp_path):
    net = copy.deepcopy(make_net("plain"))
    net.provenance["accuracy"] = float("nan")
    with pytest.raises(ArtifactError):
        net.save(tmp_path / "out")
    assert content(tmp_path) == {}


def test_permissions_are_the_users_own(saved):
    (saved / "plain").mkdir()
    (saved / "plain" / "file").touch()
    for path, like in ((saved / "super", saved / "plain"), (saved / "super" / FILES[0], saved / "plain" / "file")):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(like.stat().st_mode)


def test_a_saved_folder_can_be_moved(saved):
    shutil.move(saved / "super", saved / "elsewhere")
    assert SuperNet.load(saved / "elsewhere").strata is not None


@pytest.mark.real_weights
def test_real_deit_tiny_round_trip_through_timm(deit_tiny, tmp_path):
    """Converted, saved, and loaded strictly by plain timm; the half-size model is read back bit-identical."""
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    net = SuperNet(deit_tiny).contract([images]).stratify([images])
    net.save(tmp_path / "run")
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    plain.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    small = net.extract(macs=0.5, verbose=False)
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(plain(images), net(images))
        assert (plain(images) - deit_tiny(images)).abs().max() <= 1e-4
        assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))
    assert net.macs(net.spec(macs=0.5)) <= 0.5 * net.macs()
