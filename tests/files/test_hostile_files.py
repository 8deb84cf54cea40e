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
from children import ENVIRONMENT
from helpers import LOADERS, MIXED, Bomb, copy_of, make_images, make_model, make_net, older, same_tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import stratavit
from stratavit import ArtifactError, Recipe, Spec, StrataViTError, SuperNet
from stratavit.artifacts import folder_format
from stratavit.data.class_names import read_class_map
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.strata import Strata
from stratavit.evaluation import curve_points
from stratavit.evaluation.features import read_embeddings
from stratavit.files.torch_checkpoint import read_checkpoint
from stratavit.reports import hub
from stratavit.tasks import piad_task
from stratavit.tasks.piad_task import evaluations
from stratavit.training import run_files

IMAGES = make_images(2, seed=9)
SUPER_FILES = ("stratavit.json", "model.safetensors", "moments.safetensors")
FILES = [("super", name) for name in SUPER_FILES] + [("small", name) for name in SUPER_FILES[:2]]


def outcome(read, *args):
    """What a reader returns, or None if it refuses with one line; any other error fails the test."""
    try:
        return read(*args)
    except StrataViTError as error:
        said = str(error)
    assert said.isprintable(), said
    assert 0 < len(said) < 1200, said
    return None


@st.composite
def damage(draw, size):
    """A function from bytes to other bytes: what disks, transfers and editors do."""
    at = draw(st.integers(0, max(size - 1, 0)))
    bit, junk = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))
    flip = lambda b: b[:at] + bytes([b[at] ^ (1 << bit)]) + b[at + 1 :]  # noqa: E731
    cut, insert, delete = lambda b: b[:at], lambda b: b[:at] + junk + b[at:], lambda b: b[:at] + b[at + len(junk) :]
    return draw(st.sampled_from([flip, flip, flip, cut, insert, delete, lambda b: b[:at] + b, lambda b: b""]))


def for_damaged(path, examples, check, anything=False):
    """Calls `check` with the file damaged in many ways (or with any bytes in it); afterwards it is as it was."""
    original = path.read_bytes()
    junk = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    changes = damage(len(original)) | junk.map(lambda content: lambda _: content) if anything else damage(len(original))

    @settings(max_examples=examples)
    @given(changes)
    def run(change):
        assume(change(original) != original)
        path.write_bytes(change(original))
        check()

    try:
        run()
    finally:
        path.write_bytes(original)


def fingerprint(model):
    """All that can be observed of a model that was read: facts, tensors."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = [model.provenance, model.data_config]
    if isinstance(model, SuperNet):
        facts += [model.strata.to_json(), model.method, model.compensation, model.sites]
        for name, module in model.elastic.items():
            tensors |= {f"{name} mean": module.channel_mean, f"{name} factor": module.moments.factor}
        tensors["final mean"] = model.final_mean.vectors
    with torch.no_grad():
        tensors["outputs"] = model(IMAGES)
    return facts, tensors


def same(one, other):
    return one[0] == other[0] and same_tensors(one[1], other[1])


@pytest.fixture(scope="module")
def known(root):
    return {kind: fingerprint(load(root / kind)) for kind, load in LOADERS.items()}


# ---- hashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_a_damaged_folder_is_refused_or_gives_the_same_model(root, known, kind, file):
    def check():
        model = outcome(LOADERS[kind], root / kind)
        assert model is None or same(fingerprint(model), known[kind])
        assert model is None or file == "stratavit.json"  # of which the spaces do not count

    for_damaged(root / kind / file, 30, check)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_flipped_bit_names_the_file_and_folders_without_hashes_load(saved, known, kind):
    path = saved / kind / "model.safetensors"
    original = path.read_bytes()
    hashes = json.loads((saved / kind / "stratavit.json").read_text())["hashes"]
    assert hashes.keys() == {name for place, name in FILES if place == kind}
    assert hashes["model.safetensors"] == hashlib.sha256(original).hexdigest()  # what sha256sum says
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model\.safetensors .*hash"):
        LOADERS[kind](saved / kind)
    path.write_bytes(original)
    older(saved / kind)
    assert same(fingerprint(LOADERS[kind](saved / kind)), known[kind])
    for junk in (5, {}, {"stratavit.json": "0" * 64}):
        older(saved / kind, lambda content, junk=junk: content.update(hashes=junk))
        assert outcome(LOADERS[kind], saved / kind) is None


def test_whatever_writes_weights_writes_their_hashes(tmp_path):
    """Put into a run's folder, for the hub, specialised; with keys of the provenance that are not texts."""
    net = copy.deepcopy(make_net("plain", stratified=True))
    net.provenance |= {"per class": {9: 1.5, 10: 0.1, 100: (1, 2)}, "name": "ü"}
    (tmp_path / "run").mkdir()
    for _ in range(2):
        run_files.publish(lambda path: net.save(path, overwrite=True), piad_task.SUPER_FILES, tmp_path / "run")
        assert SuperNet.load(tmp_path / "run").provenance["per class"]["100"] == [1, 2]
        with torch.no_grad():
            net.model.head.bias += 1
    hub.write_upload(tmp_path / "run", tmp_path / "upload", "user/name", moments=False)
    SuperNet.load(tmp_path / "upload", moments=False)
    hub.write_upload(net.extract(spec=MIXED, verbose=False), tmp_path / "small", "user/name")
    assert stratavit.load(tmp_path / "small").provenance
    net.specialise(MIXED, moments=True)
    net.save(tmp_path / "specialised")
    SuperNet.load(tmp_path / "specialised")


# ---- folders without hashes ---------------------------------------------------------------------------------------


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
RAW += ['"x"', "[]", "[1]", '["x", "y", "z"]', '{"a": 1}']


@pytest.mark.parametrize("kind", LOADERS)
def test_hostile_values_in_the_json_of_an_older_folder(saved, kind):
    """Refused, or a model that holds the file's weights and runs."""
    older(saved / kind)
    path = saved / kind / "stratavit.json"
    original, weights = json.loads(path.read_text()), load_file(saved / kind / "model.safetensors")
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
        if model is not None:
            tensors = getattr(model, "model", model).state_dict()
            assert all(torch.equal(tensors[name], weights[name]) for name in weights)
            with torch.no_grad():
                outcome(model, IMAGES)

    check()


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("raw", ["NaN", "1e999", DEEP, '{"a": 1, "a": 2}', nested(99)])
def test_json_that_readers_differ_on_is_refused(saved, raw):
    """Numbers that JSON does not have, a key twice, objects and arrays nested more than 100 deep."""
    older(saved / "small")
    path = saved / "small" / "stratavit.json"
    original = path.read_text()
    for text, loads in ((raw, False), (nested(98), True)):
        path.write_text(original.replace('"provenance": {', f'"provenance": {{"x": {text}, ', 1))
        if loads:
            assert stratavit.load(saved / "small").provenance["x"] == json.loads(text)
        else:
            with pytest.raises(ArtifactError, match=r"stratavit\.json is not valid JSON"):
                stratavit.load(saved / "small")


@pytest.mark.parametrize("content", [float("nan"), json.loads(nested(200)), {1, 2}])
def test_what_cannot_be_read_again_is_not_written(root, tmp_path, content):
    model = stratavit.load(root / "small")
    model.provenance = {"x": content}
    with pytest.raises(ArtifactError, match="provenance"):
        stratavit.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path", "device"])
def test_arguments_that_lead_out_of_the_folder_are_refused(saved, tmp_path, argument):
    """timm's ``create_model`` would fetch weights, or read any file."""
    older(saved / "small", lambda content: content["model"]["args"].update({argument: str(tmp_path / "elsewhere")}))
    with pytest.raises(ArtifactError, match=f"'{argument}'"):
        stratavit.load(saved / "small")


@pytest.mark.parametrize("size", [[3, 32, 33], [3, 64, 64], [1, 32, 32]])
@pytest.mark.parametrize("kind", LOADERS)
def test_images_that_the_model_does_not_take(saved, kind, size):
    """Height and width of a model that takes no others are its own; older releases wrote others for some."""
    older(saved / kind, lambda content: content["data_config"].update(input_size=size))
    if size[0] == 3:
        assert LOADERS[kind](saved / kind).data_config["input_size"] == (3, 32, 32)
    else:
        with pytest.raises(ArtifactError, match=r"data_config .* 3 channels"):
            LOADERS[kind](saved / kind)


def test_images_of_a_model_that_takes_several_sizes(tmp_path):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True)
    stratavit.save(model, tmp_path / "small")
    for size in (64, 30, 16000):  # not a multiple of the patch; far too many tokens
        older(tmp_path / "small", lambda content, size=size: content["data_config"].update(input_size=[3, size, size]))
        if size != 64:
            with pytest.raises(ArtifactError, match="data_config"):
                stratavit.load(tmp_path / "small")
        else:
            assert stratavit.load(tmp_path / "small").data_config["input_size"] == (3, size, size)


def test_a_model_of_another_size_is_saved_as_it_is(root, tmp_path):
    model, images = stratavit.load(root / "small"), torch.randn(2, 3, 64, 64)
    model.set_input_size((64, 64))
    stratavit.save(model, tmp_path / "larger")
    again = stratavit.load(tmp_path / "larger")
    assert again.data_config["input_size"] == (3, 64, 64)
    assert torch.equal(again(images), model(images))


FACTS = [{"origin": found} for found in ([], {}, 5, {"class": [], "config": {}}, {"class": {}, "config": {}})]
FACTS += [{"frozen": "x"}, {"frozen": ["x"]}, {"label_names": [1]}, {"provenance": []}, {"model": 5}]
FACTS += [{"data_config": {"input_size": [3, 32, 32], key: value}} for key, value in {"mean": [], "std": [0.0]}.items()]


@pytest.mark.parametrize("changes", FACTS)
def test_facts_of_another_form_are_refused_by_name(saved, changes):
    older(saved / "small", lambda content: content.update(changes))
    with pytest.raises(ArtifactError, match=rf"stratavit\.json: .*{next(iter(changes))}"):
        stratavit.load(saved / "small")


@pytest.mark.parametrize("kind", LOADERS)
def test_names_of_any_length_are_shown_in_a_short_line(saved, kind):
    """Fuzzing found: of a key of the data configuration, a number of the model, a method."""
    older(saved / kind)
    original = (saved / kind / "stratavit.json").read_text()
    edits = {
        "data_config": lambda content: content["data_config"].update({"x\n" * 3000: 1}),
        "model": lambda content: content["model"]["args"].update({"x" * 3000: 10**6}),
        "method": lambda content: content.update(method=["x" * 3000]),
    }
    for place, edit in edits.items():
        (saved / kind / "stratavit.json").write_text(original)
        older(saved / kind, edit)
        assert (outcome(LOADERS[kind], saved / kind) is None) == (kind == "super" or place == "model")


# ---- what is announced and never built ----------------------------------------------------------------------------

HUGE = """
import json, resource, sys, time
from pathlib import Path
import torch, stratavit
from stratavit.artifacts.model_loading import model_at
torch.set_num_threads(1)
root = Path(sys.argv[1])
load = {"super": stratavit.SuperNet.load, "small": stratavit.load, "transformers": lambda p: model_at(str(p))}
for folder in sorted(root.iterdir()):  # everything is imported and read once before memory is limited
    load[folder.name.split("-")[0]](folder)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for folder in sorted(root.iterdir()):
    kind = folder.name.split("-")[0]
    file = folder / ("config.json" if kind == "transformers" else "stratavit.json")
    text = file.read_text()
    content = json.loads(text)
    content.pop("hashes", None)
    args = content if kind == "transformers" else content["model"]["args"]
    for number, (key, old) in enumerate(sorted(args.items())):
        if type(old) is int or (isinstance(old, list) and old and type(old[0]) in (int, list)):
            huge = (10**6, 10**9)[number % 2]
            args[key] = [huge] * len(old) if isinstance(old, list) else huge
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


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
def test_huge_sizes_are_refused_in_little_memory(tmp_path):
    """Every whole number of a description, of every family, in a process that may use 1 GB more than it has."""
    for name in architectures.NAMES:
        if name.startswith(("eva", "beit", "swin", "vit_small")):
            stratavit.save(architectures.make(name), tmp_path / "all" / f"small-{name}")
    for name in ("ViTForImageClassification", "SwinForImageClassification"):
        architectures.make(name).save_pretrained(tmp_path / "all" / f"transformers-{name}")
    make_net("plain", stratified=True).save(tmp_path / "all" / "super-plain")
    command = [sys.executable, "-c", HUGE, str(tmp_path / "all")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(rows) > 60
    bad = [r for r in rows if r[4] > 3 or any(part in r[3] for part in ("\n", "alloc", "Memory", "loaded"))]
    assert not bad, "\n".join(map(str, bad))


# ---- other files --------------------------------------------------------------------------------------------------


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


READERS = {
    "weights.pth": read_checkpoint,
    "weights.safetensors": read_checkpoint,
    "embeddings.safetensors": read_embeddings,
    "recipe.toml": Recipe.read,
    "classes.txt": read_class_map,
    "curve.csv": curve_points.read_csv,
    "state.pt": lambda path: run_files.read_state(path.parent),
}
CHECKED = ("weights.pth", "state.pt")  # with checksums: what is read is what was written


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_or_any_bytes_are_refused_or_read(files, name):
    before = READERS[name](files / name)

    def check():
        found = outcome(READERS[name], files / name)
        if found is not None and name in CHECKED:
            assert same_tensors(found.get("weights", found), before.get("weights", before))

    for_damaged(files / name, 60, check, anything=True)


PLACES = {
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_the_place_of_a_file(root, tmp_path, place):
    """Neither read without end nor waited for."""
    for name, read in READERS.items():
        PLACES[place](tmp_path / name)
        found = outcome(read, tmp_path / name)
        assert found is None or (found == [] and place == "link to itself")  # no curve.csv
    for kind, file in FILES:
        folder = copy_of(root / kind, tmp_path / f"{kind} {file}")
        (folder / file).unlink()
        PLACES[place](folder / file)
        assert outcome(LOADERS[kind], folder) is None


BYTES = b"\x80\x02cbuiltins\nbytearray\n(J" + struct.pack("<i", 10**6) + b"tR."  # torch makes one of any length


def repacked(path, pickled=None, compression=zipfile.ZIP_STORED):
    """Writes an archive of torch again."""
    with zipfile.ZipFile(path) as old:
        parts = {part: old.read(part) for part in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for part, content in parts.items():
            new.writestr(part, pickled if pickled and part.endswith("data.pkl") else content)


def array_in_the_old_form(path):
    """Pickles one after the other, no archive."""
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\x80\x02}", content.index(b"little_endian"))] + BYTES + b"\x80\x02].")


def larger_parts(path):
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02") + 20  # compressed size in the directory of the archive
    path.write_bytes(content[:at] + struct.pack("<I", 0xFFFFFF00) + content[at + 4 :])


def part_with_control_characters(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/a\x08\nb", b"0123456789")
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"0123456780"))


CHECKPOINTS = {
    "compressed": (lambda path: repacked(path, compression=zipfile.ZIP_DEFLATED), "damaged"),
    "array of any length": (lambda path: repacked(path, BYTES), "bytearray"),
    "array in the old form": (array_in_the_old_form, "bytearray"),
    "parts larger than they are": (larger_parts, "damaged"),
    "control characters": (part_with_control_characters, r"w/a\\x08\\nb"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "code": (lambda path: torch.save({"x": Bomb(path.with_name("made"))}, path), "more than plain tensors"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints(tmp_path, name):
    """Fuzzing found most of them: nothing is unpacked, and no memory is used that is only announced."""
    make, words = CHECKPOINTS[name]
    torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").keys() == {"a"}
    make(tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=rf"w\.pth .*{words}"):
        read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "w.pth").rename(tmp_path / "state.pt")
    assert outcome(run_files.read_state, tmp_path) is None
    assert not (tmp_path / "made").exists()


POINT = vars(curve_points.Point("1/2", 0.5, 100, 10, 50.0, 60.0, 1.5, 8))
NO_CURVES = [None, [5], [{}], *([POINT | changes] for changes in ({"asked": 5}, {"macs": 10**30}, {"n": float("nan")}))]
NO_ROWS = ["5", "{}", DEEP, '{"kind": "eval", "epo', '{"kind": "epoch", "epoch": "1"}', "\udcff"]
NO_ROWS += ['{"kind": "epoch", "epoch": 1, "seconds": null}']


def test_rows_and_evaluations_of_a_log_that_are_none_are_left_out(tmp_path):
    rows = [{"kind": "epoch", "epoch": 1}, {"kind": "eval", "epoch": 1, "points": [POINT]}, {"kind": "x", "epoch": 2}]
    for line in [*NO_ROWS, *(json.dumps({"kind": "eval", "epoch": 1, "points": points}) for points in NO_CURVES)]:
        lines = [json.dumps(rows[0]), line, *map(json.dumps, rows[1:])]
        (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        assert evaluations(tmp_path) == [(1, [curve_points.Point(**POINT)])], line
        journal = run_files.Journal(tmp_path / "log.jsonl")
        if line in NO_ROWS:
            assert journal.rows() == rows, line
            journal.rewind(1)
            assert journal.rows() == rows[:2]


TOML = ["seed = " + "1" * 5000, "a = " + "[" * 5000, "lr = nan", "lr = 1e999", "mlp_units = 1000000000000"]
TOML += ["seed = 100000000000000000000", "epochs = 1979-05-27", "'../x' = 1", "\ufeffepochs = 1", '"a\\nb" = 1']


@pytest.mark.parametrize("text", TOML)
def test_hostile_recipes(tmp_path, text):
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    assert outcome(Recipe.read, tmp_path / "r.toml") is None


ROW = "6/12,0.5,1,1,1,1,1,1,width"
LINES = ["6/12,nan,1,1,1,1,1,1,width", "6/12,0.5,-1,1,1,1,1,1,width", "6/12,0.5,1,1,inf,1,1,1,width"]
LINES += [f"{ROW},1,1", "6/12,0.5", "<script>,0.5,1,1,1,1,1,1,width", "6/12,0.5,1,1,1,1,1,1,depth"]
CSV = ["asked\n1", "", f"{{h}},share\n{ROW},1", *(f"{{h}}\n{line}" for line in LINES)]


@pytest.mark.parametrize("text", CSV)
def test_hostile_curves(tmp_path, text):
    columns = ",".join(curve_points.Point.__dataclass_fields__)
    (tmp_path / "curve.csv").write_text(f"{columns}\n{ROW}")
    assert outcome(curve_points.points_in, tmp_path)
    (tmp_path / "curve.csv").write_text(text.replace("{h}", columns))
    assert not outcome(curve_points.points_in, tmp_path)


LONG = "x" * 5000
SPECS = [f'{{"{LONG}": -1}}', f'{{"{LONG}": {{"qk": 1}}}}', f'{{"a": {{"{LONG}": 1}}}}']


@settings(max_examples=200)
@given(st.sampled_from(RAW + SPECS) | st.text(max_size=50))
def test_hostile_specs(raw):
    for text in (raw, f'{{"blocks.0.attn": {raw}}}'):
        found = outcome(Spec.from_json, text)
        assert found is None or all(width >= 0 for width in found.values())


@pytest.mark.parametrize("spec", [{LONG: 1}, {"blocks.0.mlp": 10**4000}, {"blocks.0.mlp": {"qk": 10**4000, "v": 1}}])
def test_long_names_and_widths_that_fit_no_model_are_refused_in_a_short_line(spec):
    assert outcome(make_net("plain").resolve, spec) is None


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*MIXED])
JUNK = LEAF | st.lists(LEAF | st.lists(LEAF, max_size=4), max_size=4) | st.dictionaries(st.text(max_size=4), LEAF)
ROWS = st.lists(st.tuples(st.sampled_from([*MIXED, "x", "../x"]), st.integers(), st.integers()).map(list), max_size=4)


@settings(max_examples=200)
@given(JUNK | ROWS)
def test_hostile_dropout_lists(rows):
    net = make_net("plain")
    found = outcome(Strata.from_json, net.sites, rows)
    assert found is None or all(net.resolve(found.spec(p)) for p in range(len(found) + 1))


def test_the_kind_of_hostile_folders(tmp_path):
    for text in (*RAW, '{"format": ["x"]}', '{"format": {"a": 1}}'):
        (tmp_path / "stratavit.json").write_text(text)
        assert outcome(folder_format.kind, tmp_path) is None


# ---- images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes with an image each, and a function that returns the labels that are read."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (40, 40), (9, 90, 200)).save(tmp_path / label / "0.png")
    config = make_net("plain").data_config

    def labels():
        batches = list(image_loader(tmp_path, config, "val", None))
        assert all(images.isfinite().all() for images, _ in batches)
        return [label for _, labels in batches for label in labels.tolist()]

    return tmp_path, labels


def test_damaged_images_are_left_out(pictures):
    folder, labels = pictures

    def check():
        assert labels() in ([1], [0, 1])

    for_damaged(folder / "cat" / "0.png", 60, check)


DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 1, 1, 0, 0, 0) + bytes(44) + struct.pack("<2I", 32, 0) + bytes(44)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", ["huge", DDS, EPS], ids=["huge", "dds", "eps"])
def test_hostile_images_are_left_out_and_not_run(pictures, monkeypatch, capsys, content):
    """One announces 10^12 pixels, for one Pillow raises no usual error, one is a program for Ghostscript."""
    (folder, labels), ran = pictures, []
    if content == "huge":
        picture = bytearray((folder / "cat" / "0.png").read_bytes())
        picture[16:24] = struct.pack(">II", 10**6, 10**6)
        picture[29:33] = struct.pack(">I", zlib.crc32(picture[12:29]))
        content = bytes(picture)
    (folder / "cat" / "0.png").write_bytes(content)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: ran.append(args) or Image.new("RGB", (9, 9)).im)
    assert labels() == [1]
    assert "1 unreadable" in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize("target", [".", ".."])
def test_links_that_lead_back_are_refused_and_others_followed(pictures, tmp_path_factory, target):
    folder, labels = pictures
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "dog" / "0.png").rename(elsewhere / "0.png")
    (folder / "dog").rmdir()
    (folder / "dog").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "itself").symlink_to("itself")
    assert labels() == [0, 1]
    (folder / "cat" / "again").symlink_to(folder / "cat" if target == "." else folder, target_is_directory=True)
    with pytest.raises(StrataViTError, match="again"):
        labels()


# ---- folders of transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_folder_of_transformers_is_refused_or_loads(tmp_path, file):
    architectures.make("ViTForImageClassification").save_pretrained(tmp_path)
    for_damaged(tmp_path / file, 40, lambda: outcome(stratavit.load_transformers, tmp_path))


@pytest.mark.parametrize("kind", ["vit", "unknown"])
def test_code_in_a_folder_of_transformers_is_not_run(tmp_path, kind):
    architectures.make("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    outcome(stratavit.load_transformers, tmp_path)
    assert not (tmp_path / "made").exists()
