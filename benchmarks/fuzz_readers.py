"""Every reader of files, with sound files to begin from and what must hold of whatever it reads."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutators as mutators
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import stratavit
from stratavit import Recipe, Spec, StrataViTError, SuperNet
from stratavit.artifacts import model_loading
from stratavit.data.class_names import read_class_map
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.strata import Strata
from stratavit.dropout_list.walk import Walk
from stratavit.evaluation import curve_points
from stratavit.evaluation.features import read_embeddings
from stratavit.interop.transformers import folders
from stratavit.training import run_files

SIZE, CLASSES = 16, 3
CUT = {"blocks.0.attn": 4, "blocks.0.mlp": 0, "blocks.1.attn": 0, "blocks.1.mlp": 17}
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LONGEST = 1200  # characters of a refusal


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file.

    Attributes:
        seeds: Contents that are read.
        check: Reads a content and raises whatever should not be: a refusal in one line is no error.
        mutate: See `fuzz_mutators`.
    """

    seeds: tuple[bytes, ...]
    check: Callable[[bytes], None]
    mutate: mutators.Mutator


def outcome(read: Callable[..., Any], *args: Any) -> Any:
    """What a reader gives, or None if it refuses with one line that does not owe to a lack of memory."""
    try:
        return read(*args)
    except StrataViTError as error:
        message = str(error)
        assert message, "an empty message"
        assert message.isprintable(), f"not one printable line: {message[:LONGEST]!r}"
        assert len(message) < LONGEST, f"a message of {len(message)} characters: {message[:200]}"
        cause: BaseException | None = error
        while cause is not None:
            short = isinstance(cause, MemoryError) or "allocate memory" in str(cause)
            assert not short, f"memory was asked for that a file announced: {cause}"
            cause = cause.__cause__ or cause.__context__
        return None


def readers(work: Path) -> dict[str, Callable[[], Reader]]:
    """Name -> what makes it, in a folder of its own."""
    made: dict[str, Callable[[], Reader]] = {
        "super/stratavit.json": lambda: _folder(work, "super", "stratavit.json", mutators.json_text),
        "super/model.safetensors": lambda: _folder(work, "super", "model.safetensors", mutators.safetensors_file),
        "super/moments.safetensors": lambda: _folder(work, "super", "moments.safetensors", mutators.safetensors_file),
        "small/stratavit.json": lambda: _folder(work, "small", "stratavit.json", mutators.json_text),
        "small/model.safetensors": lambda: _folder(work, "small", "model.safetensors", mutators.safetensors_file),
        "small of transformers/stratavit.json": lambda: _folder(work, "origin", "stratavit.json", mutators.json_text),
        "dropout list": _dropout_list,
        "spec": _spec,
        "images": lambda: _images(work),
    }
    made |= {name: lambda name=name: _file(work, name) for name in FILES}  # type: ignore[misc]
    made |= {f"transformers/{name}": lambda name=name: _transformers(work, name) for name in TRANSFORMERS}  # type: ignore[misc]
    return made


# ---- folders of ours ----------------------------------------------------------------------------


def small_model() -> VisionTransformer:
    """A ViT of a few thousand weights."""
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": 8, "num_classes": CLASSES, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, mlp_ratio=2.0).eval()


def super_network() -> SuperNet:
    """A super-network of it, from random images."""
    labels = torch.arange(12) % CLASSES
    batches = [(torch.randn(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)), labels)]
    net = SuperNet(small_model()).contract(batches).stratify(batches, plan=Walk(states=((0.7, 1), (0.5, 1)), images=12))
    return net.eval()


def _folder(work: Path, kind: str, file: str, mutate: mutators.Mutator) -> Reader:
    folder = work / "folder"
    if kind == "super":
        super_network().save(folder)
    elif kind == "small":
        stratavit.save(super_network().extract(spec=CUT), folder)
    else:
        _transformers_model().save_pretrained(work / "source")
        stratavit.save(folders.load_equivalent(work / "source"), folder)
    description = folder / "stratavit.json"
    content = {k: v for k, v in json.loads(description.read_text()).items() if k != "hashes"}
    description.write_text(json.dumps(content))  # what is behind the hashes is what is looked at
    load = SuperNet.load if kind == "super" else stratavit.load
    size = content["data_config"]["input_size"]

    def check(data: bytes) -> None:
        (folder / file).write_bytes(data)
        model = outcome(load, folder)
        if model is not None:
            _check_model(model, folder, tuple(size))

    return Reader(((folder / file).read_bytes(),), check, mutate)


def _check_model(model: Any, folder: Path, size: tuple[int, ...]) -> None:
    """It holds the file's weights, finite numbers only, and answers."""
    inner = getattr(model, "model", model)
    if not hasattr(model, "config"):  # of transformers: under names of its own
        tensors = inner.state_dict()
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensors[name], weights[name]) for name in weights), "other weights than the file's"
    known = list(inner.state_dict().values())
    if isinstance(model, SuperNet):
        for module in model.elastic.values():
            known += [module.channel_mean] + ([] if module.moments is None else [module.moments.factor])
        known += [] if model.final_mean is None else [model.final_mean.vectors]
    assert all(tensor.isfinite().all() for tensor in known), "numbers that are not finite"
    types = {parameter.dtype for parameter in inner.parameters()}
    if tuple(model.data_config["input_size"]) != size or len(types) > 1:  # of several types: runs under autocast only
        return
    with torch.no_grad():
        outcome(model, IMAGES.to(next(inner.parameters()).dtype))
        if isinstance(model, SuperNet) and model.strata is not None:
            outcome(model, IMAGES.to(next(inner.parameters()).dtype), model.strata.spec(len(model.strata)))


# ---- texts --------------------------------------------------------------------------------------


def _dropout_list() -> Reader:
    net = super_network()
    assert net.strata is not None
    rows = net.strata.to_json()

    def check(data: bytes) -> None:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):  # is refused by the reader of the folder
            return
        found = outcome(Strata.from_json, net.sites, content)
        assert found is None or all(net.resolve(found.spec(p)) for p in range(len(found) + 1))

    return Reader((json.dumps(rows).encode(), json.dumps(rows[:2]).encode(), b"[]"), check, mutators.json_text)


def _spec() -> Reader:
    net = super_network()

    def check(data: bytes) -> None:
        found = outcome(Spec.from_json, data.decode("utf-8", "surrogateescape"))
        if found is not None:
            assert all(width >= 0 for width in found.values())
            outcome(net.resolve, found)

    seeds = (json.dumps(CUT), '{"blocks.0.attn": {"qk": 8, "v": 8}}', "{}")
    return Reader(tuple(map(str.encode, seeds)), check, mutators.json_text)


# ---- single files -------------------------------------------------------------------------------


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _weights() -> dict[str, Tensor]:
    return {"a.weight": torch.ones(4, 3), "a.bias": torch.arange(4.0), "step": torch.tensor(7)}


def _state() -> dict[str, Any]:
    return {"format": run_files.FORMAT, "release": "0", "weights": _weights(), "recipe": {"epochs": 3}, "step": 2}


def _pickled(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def _repacked(archive: bytes, pickled: bytes) -> bytes:
    """The archive with another pickle in it and checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for part in old.infolist():
            new.writestr(part.filename, pickled if part.filename.endswith("data.pkl") else old.read(part))
    return buffer.getvalue()


def _old_form(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _tensor_bytes(tensors: Mapping[str, Tensor], work: Path) -> bytes:
    save_file(dict(tensors), work / "seed.safetensors")
    return (work / "seed.safetensors").read_bytes()


RECIPE = b'epochs = 3\nlist_epochs = 2\nlr = 0.05\nmode = "piad"\n[x]\ny = [1979-05-27, {a = 1}]\n'
FILES: dict[str, Callable[[Path], Any]] = {
    "recipe.toml": Recipe.read,
    "classes.txt": read_class_map,
    "curve.csv": lambda path: curve_points.points_in(path.parent),
    "embeddings.safetensors": read_embeddings,
    "weights.safetensors": model_loading.read_checkpoint,
    "weights.pth": model_loading.read_checkpoint,
    "weights.pth (old form)": model_loading.read_checkpoint,
    "weights.pth (pickle in it)": model_loading.read_checkpoint,
    "state.pt": lambda path: run_files.read_state(path.parent),
    "state.pt (pickle in it)": lambda path: run_files.read_state(path.parent),
    "log.jsonl": lambda path: [row["kind"] for row in run_files.Journal(path).rows()],
}


def _file(work: Path, name: str) -> Reader:
    path, read = work / name.split(" ")[0], FILES[name]
    content = _state() if name.startswith("state") else _weights()
    archive = _saved(content)
    packed = "pickle" in name
    seeds: dict[str, tuple[bytes, ...]] = {
        "recipe.toml": (RECIPE[:50], RECIPE, b"epochs = 1\n"),
        "classes.txt": (b"cat\ndog\nfish\n",),
        "curve.csv": (_curve(work),),
        "embeddings.safetensors": (_tensor_bytes({"text": torch.randn(3, 4)}, work),),
        "weights.safetensors": (_tensor_bytes(_weights(), work),),
        "weights.pth (old form)": (_old_form(content),),
        "log.jsonl": (b'{"kind": "eval", "epoch": 1, "points": [[1.0, 50.0]]}\n{"kind": "step", "epoch": 1}\n',),
    }
    mutate = mutators.safetensors_file if name.endswith(".safetensors") else mutators.plain
    if name.split(".")[-1] in ("toml", "csv", "txt", "jsonl"):
        mutate = mutators.words(
            *Recipe.__dataclass_fields__, *curve_points.Point.__dataclass_fields__, "6/12", "50%", "\n"
        )

    def check(data: bytes) -> None:
        path.write_bytes(_repacked(archive, data) if packed else data)
        found = outcome(read, path)
        if found is not None and name in ("weights.pth", "state.pt") and data.startswith(b"PK"):
            tensors = found.get("weights", found)  # checksums are compared
            assert tensors.keys() == _weights().keys(), "other names than were written"
            assert all(torch.equal(tensors[key], value) for key, value in _weights().items()), "other numbers"

    return Reader(seeds.get(name, (_pickled(archive) if packed else archive,)), check, mutate)


def _curve(work: Path) -> bytes:
    curve_points.write_csv([curve_points.Point("6/12", 0.5, 100, 50, 40.0, 80.0, 1.5, 10)], work / "seed.csv")
    return (work / "seed.csv").read_bytes()


# ---- images -------------------------------------------------------------------------------------


def _images(work: Path) -> Reader:
    Image.init()
    drawn, seeds = Image.effect_noise((9, 7), 60), []
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA"):
            buffer = io.BytesIO()
            try:
                drawn.convert(mode).save(buffer, form)
            except (OSError, ValueError, KeyError, AttributeError):  # cannot be written, or not in this mode
                continue
            seeds.append(buffer.getvalue())
    path = work / "images" / "cat" / "0.png"
    path.parent.mkdir(parents=True)
    drawn.save(path)
    loader = image_loader(work / "images", {"input_size": (3, SIZE, SIZE)}, "val", None)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for images, _ in loader:
            assert images.shape == (1, 3, SIZE, SIZE), "an image of another size"
            assert images.isfinite().all(), "numbers that are not finite"

    return Reader(tuple(seed for seed in seeds if len(seed) < 1 << 14), check, mutators.image)


# ---- folders of transformers --------------------------------------------------------------------

TRANSFORMERS = {
    "config.json": mutators.json_text,
    "preprocessor_config.json": mutators.json_text,
    "model.safetensors": mutators.safetensors_file,
}


def _transformers_model() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=SIZE, patch_size=8, num_labels=CLASSES)).eval()


def _transformers(work: Path, file: str) -> Reader:
    from transformers import ViTImageProcessor

    sound, folder = work / "sound", work / "transformers"
    _transformers_model().save_pretrained(sound)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(sound)
    shutil.copytree(sound, folder)

    def check(data: bytes) -> None:
        (folder / file).write_bytes(data)
        outcome(folders.load_equivalent, folder)

    return Reader(((sound / file).read_bytes(),), check, TRANSFORMERS[file])
