"""Files that are damaged or made to do harm: read as they were, or refused with one sentence. Nothing else."""

import copy
import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import architectures
import pytest
import torch
from helpers import Bomb, make_images, make_model, make_net
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import stratavit
from stratavit import ArtifactError, Recipe, Spec, StrataViTError, SuperNet
from stratavit.artifacts import folder_format, model_loading
from stratavit.data.class_names import read_class_map
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.strata import Strata
from stratavit.evaluation import curve_points
from stratavit.evaluation.features import read_embeddings
from stratavit.files import torch_checkpoint
from stratavit.reports import hub
from stratavit.tasks import piad_task
from stratavit.tasks.piad_task import evaluations
from stratavit.training import run_files

IMAGES = make_images(2, seed=9)
MIXED = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 33}
SUPER_FILES = ("stratavit.json", "model.safetensors", "moments.safetensors")
FILES = [("super", name) for name in SUPER_FILES] + [("small", name) for name in SUPER_FILES[:2]]
LOADERS = {"super": SuperNet.load, "small": stratavit.load}


def outcome(read, *args):
    """What a reader gives, or None if it refuses with one line; whatever else it raises fails the test."""
    try:
        return read(*args)
    except StrataViTError as error:
        message = str(error)
        assert message
        assert message.isprintable(), message
        assert len(message) < 1200, message
        return None


@st.composite
def damage(draw, size):
    """A function from bytes to other bytes: what disks, transfers and editors do."""
    at = draw(st.integers(0, max(size - 1, 0)))
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "delete", "overwrite", "double", "empty"]))
    bit, junk = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))
    return {
        "flip": lambda b: b[:at] + bytes([b[at] ^ (1 << bit)]) + b[at + 1 :],
        "cut": lambda b: b[:at],
        "insert": lambda b: b[:at] + junk + b[at:],
        "delete": lambda b: b[:at] + b[at + len(junk) :],
        "overwrite": lambda b: b[:at] + junk + b[at + len(junk) :],
        "double": lambda b: b[:at] + b,
        "empty": lambda b: b"",
    }[kind]


def fingerprint(model):
    """All that can be told of a model that was read."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = [model.provenance, model.data_config]
    if isinstance(model, SuperNet):
        facts += [model.strata.to_json(), model.method, model.compensation, model.sites]
        for name, module in model.elastic.items():
            tensors |= {f"{name} mean": module.channel_mean, f"{name} factor": module.moments.factor}
        tensors["final mean"] = model.final_mean.vectors
    with torch.no_grad():
        tensors["answer"] = model(IMAGES)
    return facts, tensors


def same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of a super-network and a sub-network."""
    path, net = tmp_path_factory.mktemp("saved"), make_net("plain", stratified=True)
    net.save(path / "super")
    stratavit.save(net.extract(spec=MIXED), path / "small")
    return path


@pytest.fixture(scope="module")
def known(root):
    return {kind: fingerprint(load(root / kind)) for kind, load in LOADERS.items()}


@pytest.fixture
def saved(root, tmp_path):
    """Copies that a test may change."""
    for kind in LOADERS:
        (tmp_path / kind).mkdir()
        for file in (root / kind).iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
    return tmp_path


def without_hashes(folder):
    path = folder / "stratavit.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "hashes"}))


# ---- folders of ours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_a_damaged_folder_is_refused_or_gives_the_same_model(root, known, kind, file):
    path = root / kind / file
    original = path.read_bytes()

    @settings(max_examples=60)
    @given(damage(len(original)))
    def check(change):
        damaged = change(original)
        assume(damaged != original)
        path.write_bytes(damaged)
        model = outcome(LOADERS[kind], root / kind)
        assert model is None or same(fingerprint(model), known[kind])
        assert model is None or file == "stratavit.json"  # of which the spaces do not count

    try:
        check()
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(("kind", "file"), FILES[1:3] + FILES[4:])
def test_a_flipped_bit_names_the_file_and_says_what_to_do(saved, kind, file):
    path = saved / kind / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{file} is not what was saved .*copy the file or save the model again"):
        LOADERS[kind](saved / kind)


@pytest.mark.parametrize("kind", LOADERS)
def test_folders_of_older_releases_have_no_hashes_and_load(saved, known, kind):
    without_hashes(saved / kind)
    assert same(fingerprint(LOADERS[kind](saved / kind)), known[kind])


@pytest.mark.parametrize("junk", [5, [], {}, {"model.safetensors": "x"}, {"stratavit.json": "0" * 64}, "x"])
def test_hashes_that_are_none(saved, junk):
    path = saved / "small" / "stratavit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hashes": junk}))
    assert outcome(stratavit.load, saved / "small") is None


def test_the_hash_of_a_file_is_sha256sum(saved):
    hashes = json.loads((saved / "super" / "stratavit.json").read_text())["hashes"]
    assert hashes.keys() == set(SUPER_FILES)
    for name in SUPER_FILES[1:]:
        assert hashes[name] == hashlib.sha256((saved / "super" / name).read_bytes()).hexdigest()


def test_whatever_writes_weights_writes_their_hashes(tmp_path):
    """Without moments, specialised, put into a run's folder, for the hub."""
    net = copy.deepcopy(make_net("plain", stratified=True))
    net.save(tmp_path / "less", moments=False)
    SuperNet.load(tmp_path / "less")
    (tmp_path / "run").mkdir()
    save = lambda path: net.save(path, overwrite=True)  # noqa: E731
    for _ in range(2):
        run_files.publish(save, piad_task.SUPER_FILES, tmp_path / "run")
        SuperNet.load(tmp_path / "run")
        with torch.no_grad():
            net.model.head.bias += 1
    hub.write_upload(tmp_path / "run", tmp_path / "upload", "user/name", moments=False)
    SuperNet.load(tmp_path / "upload", moments=False)
    hub.write_upload(net.extract(spec=MIXED), tmp_path / "small", "user/name")
    stratavit.load(tmp_path / "small")
    net.specialise(MIXED, moments=True)
    net.save(tmp_path / "specialised")
    SuperNet.load(tmp_path / "specialised")


@pytest.mark.parametrize("kind", LOADERS)
def test_keys_that_are_no_text_do_not_change_the_hash(tmp_path, kind):
    net = copy.deepcopy(make_net("plain", stratified=True))
    model = net if kind == "super" else net.extract(spec=MIXED)
    model.provenance |= {"per class": {9: 1.5, 10: 0.1, 100: (1, 2)}, "name": "ü"}
    model.save(tmp_path / "run") if kind == "super" else stratavit.save(model, tmp_path / "run")
    assert LOADERS[kind](tmp_path / "run").provenance["per class"]["100"] == [1, 2]


def places(value, path=()):
    """Paths of every value inside nested dicts and lists (of lists the first)."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else [])
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


DEEP = "[" * 100_000 + "]" * 100_000
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, DEEP, '"\\ud800"', '{"a": 1, "a": 2}', "\x00"]
RAW += [str(10**9), str(10**18), str(10**30), "-1", "0", "-5.5", '"../../../etc/passwd"', '"/dev/zero"', '"\\n\\u0000"']
RAW += ['{"__class__": 1}', '"' + "x" * 100_000 + '"', "[[[[]]]]", "true", "null", "1e300", "5e-324", "[1000000000]"]


@pytest.mark.parametrize("kind", LOADERS)
def test_hostile_values_in_the_json_of_an_older_folder(root, saved, known, kind):
    """No hash is there to find them: refused, or a model that holds the file's weights and runs."""
    path = saved / kind / "stratavit.json"
    original = {k: v for k, v in json.loads(path.read_text()).items() if k != "hashes"}
    weights = load_file(saved / kind / "model.safetensors")
    where = [place for place in places(original) if "blocks.1.attn" not in place]

    @settings(max_examples=120)
    @given(st.sampled_from(where), st.sampled_from(RAW))
    def check(place, raw):
        changed = copy.deepcopy(original)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = "<here>"
        path.write_text(json.dumps(changed).replace('"<here>"', raw))
        model = outcome(LOADERS[kind], saved / kind)
        if model is None:
            return
        tensors = getattr(model, "model", model).state_dict()
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)
        with torch.no_grad():
            outcome(model, IMAGES)

    check()


@pytest.mark.parametrize("raw", ["NaN", "Infinity", "1e999", DEEP, '{"a": 1, "a": 2}'])
def test_json_that_readers_differ_on_is_refused(saved, raw):
    path = saved / "small" / "stratavit.json"
    without_hashes(saved / "small")
    path.write_text(path.read_text().replace('"provenance": {', f'"provenance": {{"x": {raw}, ', 1))
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        stratavit.load(saved / "small")


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path", "pretrained_cfg", "cache_dir", "device"])
def test_arguments_that_lead_out_of_the_folder_are_refused(saved, tmp_path, argument):
    """timm's ``create_model`` would fetch weights, or read any file."""
    without_hashes(saved / "small")
    path = saved / "small" / "stratavit.json"
    content = json.loads(path.read_text())
    content["model"]["args"][argument] = str(tmp_path / "elsewhere.pth")
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"'{argument}' is no argument that describes a model"):
        stratavit.load(saved / "small")


@pytest.mark.parametrize("size", [[3, 32, 33], [3, 33, 32], [6, 32, 32], [3, 64, 64], [3, 1, 1], [1, 32, 32]])
@pytest.mark.parametrize("kind", LOADERS)
def test_images_that_the_model_does_not_take(saved, kind, size):
    """Fuzzing found: a super-network counts its MACs on such an image, a small model is evaluated on them.

    Height and width of a model that takes no others are its own; older releases wrote others for some.
    """
    without_hashes(saved / kind)
    path = saved / kind / "stratavit.json"
    content = json.loads(path.read_text())
    assert content["data_config"]["input_size"] == [3, 32, 32]
    content["data_config"]["input_size"] = size
    path.write_text(json.dumps(content))
    if size[0] == 3:
        assert LOADERS[kind](saved / kind).data_config["input_size"] == (3, 32, 32)
    else:
        with pytest.raises(
            ArtifactError, match=r"data_config prepares images of .* the model reads 3 channels in patch"
        ):
            LOADERS[kind](saved / kind)


def test_a_model_of_another_size_is_saved_as_it_is(saved, tmp_path):
    model = stratavit.load(saved / "small")
    model.set_input_size((64, 64))
    stratavit.save(model, tmp_path / "larger")
    again = stratavit.load(tmp_path / "larger")
    images = torch.randn(2, 3, 64, 64)
    assert again.data_config["input_size"] == (3, 64, 64)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("size", [32, 64, 16, 30, 4, 16000])
def test_images_of_a_model_that_takes_several_sizes(tmp_path, size):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True)
    stratavit.save(model, tmp_path / "small")
    without_hashes(tmp_path / "small")
    path = tmp_path / "small" / "stratavit.json"
    content = json.loads(path.read_text())
    content["data_config"]["input_size"] = [3, size, size]
    path.write_text(json.dumps(content))
    if size in (30, 4):  # no multiple of the patch
        with pytest.raises(ArtifactError, match="data_config prepares images of"):
            stratavit.load(tmp_path / "small")
    elif size == 16000:
        with pytest.raises(ArtifactError, match=r"data_config makes .* tokens, expected at most"):
            stratavit.load(tmp_path / "small")
    else:
        assert stratavit.load(tmp_path / "small").data_config["input_size"] == (3, size, size)


@pytest.mark.parametrize("found", [[], {}, 5, {"class": [], "config": {}}, {"class": {}, "config": {}}])
def test_an_origin_that_is_none(saved, found):
    without_hashes(saved / "small")
    path = saved / "small" / "stratavit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": found}))
    with pytest.raises(ArtifactError, match="origin should be a class of"):
        stratavit.load(saved / "small")


def header(path):
    """Of a safetensors file: its header as an object, and what follows."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(path, text, rest):
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + rest)


HEADERS = {
    "huge shape": lambda h: h["norm.bias"].update(shape=[10**9]),
    "huge shape and offsets": lambda h: h["norm.bias"].update(shape=[10**9], data_offsets=[0, 4 * 10**9]),
    "overflowing shape": lambda h: h["norm.bias"].update(shape=[2**62, 4]),
    "negative shape": lambda h: h["norm.bias"].update(shape=[-1]),
    "overlap": lambda h: h["norm.bias"].update(data_offsets=h["norm.weight"]["data_offsets"]),
    "integers": lambda h: h["norm.bias"].update(dtype="I32"),
    "unknown type": lambda h: h["norm.bias"].update(dtype="X99"),
    "path as name": lambda h: h.update({"../../evil": h.pop("norm.bias")}),
    "lines in a name": lambda h: h.update({"a\nb\u2028c": h.pop("norm.bias")}),
    "no header": lambda h: h.clear(),
    "text as shape": lambda h: h["norm.bias"].update(shape="x"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kind", LOADERS)
def test_hostile_headers_of_an_older_folder(saved, kind, name):
    without_hashes(saved / kind)
    path = saved / kind / "model.safetensors"
    announced, rest = header(path)
    HEADERS[name](announced)
    with_header(path, json.dumps(announced), rest)
    assert outcome(LOADERS[kind], saved / kind) is None


def test_another_float_type_of_an_older_folder(saved, tmp_path):
    """bfloat16 for float16 is the same number of bytes: other numbers, in silence."""
    stratavit.save(stratavit.load(saved / "small").half(), tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    without_hashes(tmp_path / "half")
    stratavit.load(tmp_path / "half")
    announced, rest = header(path)
    announced["norm.bias"].update(dtype="BF16")
    with_header(path, json.dumps(announced), rest)
    with pytest.raises(ArtifactError, match=r"is of type float16, norm.bias of bfloat16; without a hash"):
        stratavit.load(tmp_path / "half")


def test_weights_of_several_float_types_are_read_as_they_were_saved(saved, tmp_path):
    """Norms in float32 are usual; hashes vouch for them."""
    model = stratavit.load(saved / "small").half()
    model.norm.float()
    stratavit.save(model, tmp_path / "mixed")
    assert stratavit.load(tmp_path / "mixed").norm.bias.dtype == torch.float32


@pytest.mark.parametrize("depth", [100, 101, 500, 900])
def test_a_json_file_nested_too_deeply(saved, depth):
    """Deeper than ours ever are, but not so deep that Python's reader minds."""
    without_hashes(saved / "small")
    path = saved / "small" / "stratavit.json"
    nested = "[" * (depth - 2) + "]" * (depth - 2)  # in the provenance, in the file's object
    path.write_text(path.read_text().replace('"provenance": {', f'"provenance": {{"x": {nested}, ', 1))
    if depth <= 100:
        stratavit.load(saved / "small")
    else:
        with pytest.raises(ArtifactError, match=r"is not valid JSON .it is nested deeper than 100 levels"):
            stratavit.load(saved / "small")


def test_what_would_be_nested_too_deeply_is_not_written(saved, tmp_path):
    model, nested = stratavit.load(saved / "small"), []
    for _ in range(200):
        nested = [nested]
    model.provenance = {"x": nested}
    with pytest.raises(ArtifactError, match=r"holds something that JSON cannot .it is nested deeper"):
        stratavit.save(model, tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


def test_a_header_that_never_ends(saved):
    without_hashes(saved / "small")
    path = saved / "small" / "model.safetensors"
    for size in (2**63, 2**40, 10**9, 99_000_000):
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        assert outcome(stratavit.load, saved / "small") is None
    with_header(path, DEEP, b"")
    assert outcome(stratavit.load, saved / "small") is None


@pytest.mark.parametrize("change", ["renamed", "integers", "one factor less"])
def test_moments_of_an_older_folder_that_say_less_than_they_should(saved, change):
    without_hashes(saved / "super")
    path = saved / "super" / "moments.safetensors"
    tensors = load_file(path)
    if change == "renamed":
        tensors["blocks.0.mlp.factoR"] = tensors.pop("blocks.0.mlp.factor")
    if change == "integers":
        tensors["blocks.0.attn.mean"] = tensors["blocks.0.attn.mean"].int()
    if change == "one factor less":
        del tensors["blocks.0.mlp.factor"]
    save_file(tensors, path)
    assert outcome(SuperNet.load, saved / "super") is None


@pytest.mark.parametrize("name", ["blocks.0.mlp.mean", "final_mean.vectors"])
def test_moments_that_are_finite_in_the_file_only(saved, name):
    without_hashes(saved / "super")
    path = saved / "super" / "moments.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], 1e300, dtype=torch.float64)
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="finite numbers"):
        SuperNet.load(saved / "super")


# ---- what is announced and never built ------------------------------------------------------------------

HUGE = """
import json, resource, sys, time
from pathlib import Path
import torch, stratavit
from stratavit.artifacts.model_loading import model_at
torch.set_num_threads(1)
root = Path(sys.argv[1])
load = {"super": stratavit.SuperNet.load, "small": stratavit.load, "transformers": lambda p: model_at(str(p))}
files = {"transformers": "config.json"}
for folder in sorted(root.iterdir()):  # everything is imported and read once before memory is limited
    load[folder.name.split("-")[0]](folder)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for folder in sorted(root.iterdir()):
    kind = folder.name.split("-")[0]
    file = folder / files.get(kind, "stratavit.json")
    text = file.read_text()
    content = json.loads(text)
    content.pop("hashes", None)
    args = content if kind == "transformers" else content["model"]["args"]
    for key, old in sorted(args.items()):
        if type(old) is int or (isinstance(old, list) and old and type(old[0]) in (int, list)):
            for huge in (10**6, 10**9):
                args[key] = json.loads(json.dumps(old)) if isinstance(old, list) else huge
                if isinstance(old, list):
                    args[key] = [huge] * len(old)
                file.write_text(json.dumps(content))
                started, said = time.perf_counter(), "loaded"
                try:
                    load[kind](folder)
                except stratavit.StrataViTError as error:
                    said = str(error)
                print(json.dumps([folder.name, key, huge, said, time.perf_counter() - started]))
            args[key] = old
    file.write_text(text)
"""
TRANSFORMERS = ("ViTForImageClassification", "SwinForImageClassification")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
def test_huge_sizes_are_refused_in_little_memory(root, tmp_path):
    """Every whole number of a description, of every family, in a process that may take 1 GB more than it has."""
    names = [name for name in architectures.NAMES if name.startswith(("eva", "beit", "swin", "vit_small"))]
    for name in names:
        stratavit.save(architectures.make(name), tmp_path / "all" / f"small-{name}")
    for name in TRANSFORMERS:
        architectures.make(name).save_pretrained(tmp_path / "all" / f"transformers-{name}")
    make_net("plain", stratified=True).save(tmp_path / "all" / "super-plain")
    paths = [str(Path(stratavit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", HUGE, str(tmp_path / "all")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    print(f"{len(rows)} numbers")
    assert len(rows) > 60
    bad = [row for row in rows if "\n" in row[3] or "alloc" in row[3] or "Memory" in row[3] or row[4] > 3]
    assert not bad, "\n".join(map(str, bad))
    loaded = {(row[0], row[1]) for row in rows if row[3] == "loaded"}
    assert {key for _, key in loaded} <= {"x"}, loaded


# ---- other files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One sound file of every kind that readers below take."""
    path, weights = tmp_path_factory.mktemp("files"), make_model("plain").state_dict()
    torch.save(weights, path / "weights.pth")
    save_file(weights, path / "weights.safetensors")
    save_file({"text": torch.randn(7, 32)}, path / "embeddings.safetensors")
    (path / "recipe.toml").write_text('epochs = 3\nlist_epochs = 2\nlr = 0.05\nmode = "piad"\n')
    (path / "classes.txt").write_text("cat\ndog\nfish\n")
    curve_points.write_csv([curve_points.Point("6/12", 0.5, 100, 50, 40.0, 80.0, 1.5, 10)], path / "curve.csv")
    run_files.write_state(path, {"weights": weights, "recipe": {"epochs": 3}, "step": 2})
    return path


def tensors_of(found):
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


READERS = {
    "weights.pth": model_loading.read_checkpoint,
    "weights.safetensors": model_loading.read_checkpoint,
    "embeddings.safetensors": read_embeddings,
    "recipe.toml": Recipe.read,
    "classes.txt": read_class_map,
    "curve.csv": curve_points.read_csv,
    "state.pt": lambda path: run_files.read_state(path.parent),
}
CHECKED = ("weights.pth", "state.pt")  # with checksums: what is read is what was written


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_read(files, name):
    path, read = files / name, READERS[name]
    original, before = path.read_bytes(), read(path)

    @settings(max_examples=100)
    @given(damage(len(original)))
    def check(change):
        path.write_bytes(change(original))
        found = outcome(read, path)
        if found is not None and name in CHECKED:
            ours, theirs = tensors_of(found.get("weights", found)), tensors_of(before.get("weights", before))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    try:
        check()
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_in_the_place_of_a_file(files, name):
    path = files / name
    original = path.read_bytes()

    @settings(max_examples=50)
    @given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
    def check(content):
        path.write_bytes(content)
        outcome(READERS[name], path)

    try:
        check()
    finally:
        path.write_bytes(original)


def loop(path):
    path.symlink_to(path.name)


PLACES = {
    "folder": Path.mkdir,
    "link to itself": loop,
    "pipe": os.mkfifo,
    "device": lambda p: p.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*READERS, *(f"{kind}/{file}" for kind, file in FILES)])
def test_something_else_in_the_place_of_a_file(root, files, saved, tmp_path, name, place):
    """Neither read without end nor waited for."""
    kind, _, _ = name.rpartition("/")
    path = saved / name if kind else tmp_path / name
    path.unlink(missing_ok=True)
    PLACES[place](path)
    found = outcome(LOADERS[kind], saved / kind) if kind else outcome(READERS[name], path)
    assert found is None or (found == [] and place == "link to itself")  # no curve.csv


TENSORS = {
    "sparse": torch.zeros(32).to_sparse(),
    "without numbers": torch.zeros(32, device="meta"),
    "integers": torch.zeros(32, dtype=torch.int64),
    "complex": torch.zeros(32, dtype=torch.complex64),
    "8 bits": torch.zeros(32, dtype=torch.float8_e4m3fn),
    "NaN": torch.full((32,), float("nan")),
    "one number at 10^9 places": torch.zeros(1).expand(10**9),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_kinds_in_a_checkpoint(tmp_path, name):
    state = make_model("plain").state_dict() | {"norm.bias": TENSORS[name]}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"norm\.bias"):
        model_loading.load_weights(make_model("plain"), model_loading.read_checkpoint(tmp_path / "w.pth"), "w.pth")


NO_CURVES: list[object] = [None, 5, "points", [5], [{"asked": "1"}], [{}]]


@pytest.mark.parametrize("points", NO_CURVES)
def test_evaluations_of_a_log_that_are_none_are_left_out(tmp_path, points):
    point = curve_points.Point("1/2", 0.5, 100, 10, 50.0, 60.0, 1.5, 8)
    rows = [{"kind": "eval", "epoch": 1, "points": [vars(point)]}, {"kind": "eval", "epoch": 2, "points": points}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve_points.curves(run_files.Journal(tmp_path / "log.jsonl").rows()) == [(1, [point]), (2, [])]
    assert evaluations(tmp_path) == [(1, [point])]  # that can be drawn


@pytest.mark.parametrize("value", [None, "0.5", [], 10**30, -1, True, float("nan")])
@pytest.mark.parametrize("name", ["asked", "share", "macs", "top1", "n"])
def test_points_of_a_log_with_other_values_are_left_out(tmp_path, name, value):
    point = vars(curve_points.Point("1/2", 0.5, 100, 10, 50.0, 60.0, 1.5, 8))
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "eval", "epoch": 1, "points": [point | {name: value}]}))
    kept = (name == "asked" and value == "0.5") or (name != "asked" and value is True)  # JSON's true is 1
    assert len(evaluations(tmp_path)) == kept


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as old,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert outcome(model_loading.read_checkpoint, tmp_path / "bomb.pth") is None


def test_an_array_of_any_length_in_a_checkpoint_is_not_made(tmp_path):
    """torch's reader without code makes a bytearray of as many bytes as the file says."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    pickled = b"\x80\x02cbuiltins\nbytearray\n(J" + struct.pack("<i", 10**6) + b"tR."
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "state.pt", "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, pickled if part.filename.endswith("data.pkl") else old.read(part))
    assert len(torch.load(tmp_path / "state.pt", weights_only=True)) == 10**6
    with pytest.raises(ArtifactError, match=r"state\.pt holds a bytearray, .* save a state dict"):
        torch_checkpoint.check_archive(tmp_path / "state.pt", "")


def test_the_same_in_a_checkpoint_of_the_old_form(tmp_path):
    """Pickles one after the other, no archive."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert outcome(model_loading.read_checkpoint, tmp_path / "w.pth").keys() == {"a"}
    content, pickled = (tmp_path / "w.pth").read_bytes(), b"\x80\x02cbuiltins\nbytearray\n(J"
    heads = content[: content.index(b"\x80\x02}", content.index(b"little_endian"))]
    (tmp_path / "bomb.pth").write_bytes(heads + pickled + struct.pack("<i", 10**6) + b"tR." + b"\x80\x02].")
    assert len(torch.load(tmp_path / "bomb.pth", weights_only=True)) == 10**6
    with pytest.raises(ArtifactError, match=r"bomb\.pth holds a bytearray"):
        model_loading.read_checkpoint(tmp_path / "bomb.pth")


def test_a_text_of_any_length_in_a_checkpoint_of_the_old_form(tmp_path):
    """Fuzzing found: torch asks for as much memory as the text is said to be long."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pth").read_bytes()
    assert content.count(b"X\x06\x00\x00\x00weight") == 1
    (tmp_path / "w.pth").write_bytes(content.replace(b"X\x06\x00\x00\x00weight", b"X\xff\xff\xff\xffweight"))
    with pytest.raises(ArtifactError, match=r"w\.pth is damaged; copy"):
        model_loading.read_checkpoint(tmp_path / "w.pth")


def test_parts_that_are_said_to_be_larger_than_they_are(tmp_path):
    """Fuzzing found: as many bytes are asked for as the archive says."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    at = content.index(b"PK\x01\x02") + 20  # compressed size in the directory of the archive
    (tmp_path / "w.pth").write_bytes(content[:at] + struct.pack("<I", 0xFFFFFF00) + content[at + 4 :])
    with pytest.raises(ArtifactError, match=r"w\.pth is damaged; copy"):
        model_loading.read_checkpoint(tmp_path / "w.pth")


def test_names_of_parts_are_told_in_one_line(tmp_path):
    """Fuzzing found: one with a backspace in it."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "a") as archive:
        archive.writestr("w/a\x08\nb", b"0123456789")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content.replace(b"0123456789", b"0123456780"))
    with pytest.raises(ArtifactError, match=r"the checksum of w/a\\x08\\nb differs"):
        model_loading.read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"P", b"\x80"])
def test_a_checkpoint_of_hardly_any_bytes(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    assert outcome(model_loading.read_checkpoint, tmp_path / "w.pth") is None


def test_code_in_a_state_is_not_run(tmp_path):
    torch.save({"format": run_files.FORMAT, "x": Bomb(tmp_path / "made")}, tmp_path / "state.pt")
    with pytest.raises(ArtifactError, match="is damaged"):
        run_files.read_state(tmp_path)
    assert not (tmp_path / "made").exists()


NO_ROWS = ["5", "{}", DEEP, '{"kind": "eval"}', '{"kind": "eval", "epo', '{"kind": "epoch", "epoch": "1"}']
NO_ROWS += ['{"kind": "epoch", "epoch": 1, "seconds": null}']


@pytest.mark.parametrize("line", [b"\xff", *(text.encode() for text in NO_ROWS)])
def test_lines_of_a_log_that_are_no_rows_are_left_out(tmp_path, line):
    rows = [{"kind": "epoch", "epoch": 1}, {"kind": "epoch", "epoch": 2}]
    lines = [json.dumps(rows[0]).encode(), line, json.dumps(rows[1]).encode()]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    journal = run_files.Journal(tmp_path / "log.jsonl")
    assert journal.rows() == rows
    journal.rewind(1)
    assert journal.rows() == rows[:1]


TOML = [
    "seed = " + "1" * 5000,
    "lr = 1" + "0" * 400,
    "a = " + "[" * 5000,
    "epochs = 1\nepochs = 2",
    "lr = nan",
    "lr = inf",
]
TOML += [
    "lr = 1e999",
    "mlp_units = 1000000000000",
    "seed = 100000000000000000000",
    "epochs = 1979-05-27",
    "workers = -1",
]
TOML += ["[epochs]\nx = 1", "'../x' = 1", "tracker = ['a']", "lr = 0x" + "f" * 300, "\ufeffepochs = 1", '"a\\nb" = 1']


@pytest.mark.parametrize("text", TOML)
def test_hostile_recipes(tmp_path, text):
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(StrataViTError, match=r"r\.toml"):
        Recipe.read(tmp_path / "r.toml")
    assert outcome(Recipe.read, tmp_path / "r.toml") is None


CSV = ["asked\n1", "", ",".join(["asked"] * 8), "{h}\n6/12,nan,1,1,1,1,1,1", "{h}\n6/12,0.5,1,1,inf,1,1,1"]
CSV += [
    "{h}\n6/12,0.5,-1,1,1,1,1,1",
    "{h}\n" + "9" * 5000 + ",1,1,1,1,1,1,1",
    "{h}\n6/12,0.5,1" + "0" * 30 + ",1,1,1,1,1",
]
CSV += [
    "{h}\n6/12,0.5,1,1,1,1,1,1,1,1",
    "{h}\n6/12,0.5",
    "{h}\n<script>,0.5,1,1,1,1,1,1",
    "{h},share\n6/12,1,1,1,1,1,1,1,1",
]


@pytest.mark.parametrize("text", CSV)
def test_hostile_curves(tmp_path, text):
    columns = ",".join(curve_points.Point.__dataclass_fields__)
    (tmp_path / "curve.csv").write_text(text.replace("{h}", columns))
    assert not outcome(curve_points.points_in, tmp_path)


@settings(max_examples=300)
@given(st.sampled_from(RAW) | st.text(max_size=50))
def test_hostile_specs(raw):
    for text in (raw, f'{{"blocks.0.attn": {raw}}}'):
        found = outcome(Spec.from_json, text)
        assert found is None or all(width >= 0 for width in found.values())


LONG = "x" * 5000


@pytest.mark.parametrize("text", [f'{{"{LONG}": -1}}', f'{{"{LONG}": {{"qk": 1}}}}', f'{{"a": {{"{LONG}": 1}}}}'])
def test_long_names_in_a_spec_are_cut_short_in_the_refusal(text):
    assert outcome(Spec.from_json, text) is None


@pytest.mark.parametrize("spec", [{LONG: 1}, {"blocks.0.mlp": 10**4000}, {"blocks.0.mlp": {"qk": 10**4000, "v": 1}}])
def test_long_names_and_widths_that_fit_no_model_are_cut_short_in_the_refusal(spec):
    assert outcome(make_net("plain").resolve, spec) is None


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*MIXED]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
ROWS = st.lists(st.tuples(st.sampled_from([*MIXED, "x", "../x"]), st.integers(), st.integers()).map(list), max_size=4)


@settings(max_examples=300)
@given(JUNK | ROWS)
def test_hostile_dropout_lists(rows):
    net = make_net("plain")
    found = outcome(Strata.from_json, net.sites, rows)
    assert found is None or all(net.resolve(found.spec(p)) for p in range(len(found) + 1))


# ---- images ----------------------------------------------------------------------------------------------------


def image_folder(path, name="0.png"):
    for label in ("cat", "dog"):
        (path / label).mkdir(parents=True)
        Image.new("RGB", (40, 40), (9, 90, 200)).save(path / label / name)
    return path


def test_damaged_images_are_left_out(tmp_path):
    folder = image_folder(tmp_path / "images")
    config = make_net("plain").data_config
    path = folder / "cat" / "0.png"
    original = path.read_bytes()

    @settings(max_examples=100)
    @given(damage(len(original)))
    def check(change):
        path.write_bytes(change(original))
        for images, labels in image_loader(folder, config, "val", None):
            assert images.isfinite().all()
            assert 1 in labels.tolist()

    check()


def test_an_image_that_announces_a_huge_size_is_left_out(tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    path = folder / "cat" / "0.png"
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 10**6, 10**6)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    assert [labels.tolist() for _, labels in image_loader(folder, make_net("plain").data_config, "val", None)] == [[1]]
    assert "left out 1 unreadable" in capsys.readouterr().err


DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 1, 1, 0, 0, 0) + bytes(44) + struct.pack("<2I", 32, 0) + bytes(44)


@pytest.mark.parametrize(
    "content", [DDS, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"]
)
def test_other_formats_under_the_name_of_an_image_are_left_out_and_not_run(tmp_path, monkeypatch, content):
    """One for which Pillow raises no usual error; one that is a program, which Pillow gives to Ghostscript."""
    folder, ran = image_folder(tmp_path / "images"), []
    (folder / "cat" / "0.png").write_bytes(content)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: ran.append(args) or Image.new("RGB", (9, 9)).im)
    assert [labels.tolist() for _, labels in image_loader(folder, make_net("plain").data_config, "val", None)] == [[1]]
    assert not ran


@pytest.mark.parametrize("target", [".", "..", "cat"])
def test_links_that_lead_back_are_refused(tmp_path, target):
    folder = image_folder(tmp_path / "images")
    (folder / "cat" / "again").symlink_to(folder if target == ".." else folder / "cat", target_is_directory=True)
    with pytest.raises(StrataViTError, match="again is a link to a folder that holds it"):
        image_loader(folder, make_net("plain").data_config, "val", None)


def test_links_to_other_folders_are_followed(tmp_path):
    elsewhere = image_folder(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).symlink_to(elsewhere / label, target_is_directory=True)
    (tmp_path / "images" / "dog" / "itself").symlink_to("itself")
    loader = image_loader(tmp_path / "images", make_net("plain").data_config, "val", None)
    assert sum(len(labels) for _, labels in loader) == 2


# ---- folders of transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_folder_of_transformers_is_refused_or_loads(tmp_path, file):
    architectures.make("ViTForImageClassification").save_pretrained(tmp_path)
    path = tmp_path / file
    original = path.read_bytes()

    @settings(max_examples=40)
    @given(damage(len(original)))
    def check(change):
        path.write_bytes(change(original))
        outcome(stratavit.load_transformers, tmp_path)

    check()


@pytest.mark.parametrize("kind", ["vit", "unknown"])
def test_code_in_a_folder_of_transformers_is_not_run(tmp_path, kind):
    architectures.make("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    outcome(stratavit.load_transformers, tmp_path)
    assert not (tmp_path / "made").exists()


def test_artifacts_tell_the_kind_of_hostile_folders(tmp_path):
    for text in (*RAW, '{"format": ["x"]}', '{"format": {"a": 1}}'):
        (tmp_path / "stratavit.json").write_text(text)
        assert outcome(folder_format.kind, tmp_path) is None


@pytest.mark.parametrize("kind", LOADERS)
def test_names_of_any_length_are_told_in_a_short_line(saved, kind):
    """Fuzzing found: of a key of the data configuration, a number of the model, a method."""
    path = saved / kind / "stratavit.json"
    without_hashes(saved / kind)
    content = json.loads(path.read_text())
    for place in ("data_config", "model", "method"):
        changed = copy.deepcopy(content)
        if place == "model":
            changed["model"]["args"]["x" * 3000] = 10**6
        elif place == "method":
            changed["method"] = ["x" * 3000]
        else:
            changed["data_config"]["x\n" * 3000] = 1
        path.write_text(json.dumps(changed))
        found = outcome(LOADERS[kind], saved / kind)
        assert found is None or (kind == "small" and place != "model")
