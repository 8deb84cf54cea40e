"""Images without labels: the same ones from every form in which people have them."""

import tarfile

import pytest
import torch
import webdataset
from datasets import Dataset, DatasetDict, Image
from image_folders import CONFIG
from PIL import Image as Pillow
from torch.utils.data import DataLoader, TensorDataset

from stratavit import StrataViTError
from stratavit.data import unlabelled
from stratavit.data.named_data_sets import which_split
from stratavit.data.unlabelled import check_there, images_in, opened

COUNT = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The same images flat, nested, in a tar file, in shards, and in a data set that was saved in two ways."""
    folder = tmp_path_factory.mktemp("forms")
    generator = torch.Generator().manual_seed(0)
    for name in ("flat", "nested/a/b", "nested/c", "shards", "parquet"):
        (folder / name).mkdir(parents=True)
    for number in range(COUNT):
        pixels = torch.randint(0, 256, (10, 12, 3), generator=generator, dtype=torch.uint8)
        for place in ("flat", "nested/a/b" if number < 4 else "nested/c"):
            Pillow.fromarray(pixels.numpy()).save(folder / place / f"{number}.png")
    (folder / "flat/list.txt").write_text("of the images")
    archive(folder / "all.tar", paths(folder))
    archive(folder / "shards/birds-train-00.tar", paths(folder)[:4])
    archive(folder / "shards/birds-train-01.tar", paths(folder)[4:])
    archive(folder / "shards/birds-val-00.tar", paths(folder)[:2])
    data_set(folder).save_to_disk(folder / "saved")
    data_set(folder).to_parquet(folder / "parquet/train.parquet")
    return folder


def paths(folder):
    return [folder / "flat" / f"{number}.png" for number in range(COUNT)]


def archive(path, files):
    """A tar file as a shard of a webdataset: each image is followed by its class."""
    (path.parent / "0.cls").write_text("3")
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, f"./{file.name}")
            tar.add(path.parent / "0.cls", f"./{file.stem}.cls")
        tar.add(files[0], f"__MACOSX/._{files[0].name}")
    (path.parent / "0.cls").unlink()


def data_set(folder):
    columns = {"label": list(range(COUNT)), "image": [str(path) for path in paths(folder)]}
    return Dataset.from_dict(columns).cast_column("image", Image())


def samples(folder, key="image"):
    return [{key: Pillow.open(path), "label": 1} for path in paths(folder)]


def everything(images, **options):
    return torch.cat([batch for batch, _ in opened(images, CONFIG, **{"limit": 100, "batch_size": 4} | options)])


@pytest.fixture(scope="module")
def expected(work):
    found = everything(work / "flat")
    assert found.shape == (COUNT, 3, 8, 8)
    return found


FORMS = {
    "text": lambda work: str(work / "flat"),
    "nested": lambda work: work / "nested",
    "paths": paths,
    "texts": lambda work: [str(path) for path in paths(work)],
    "tar": lambda work: work / "all.tar",
    "shards": lambda work: work / "shards",
    "list of shards": lambda work: [work / f"shards/birds-train-0{number}.tar" for number in range(2)],
    "datasets": data_set,
    "splits": lambda work: DatasetDict(test=data_set(work), train=data_set(work)),
    "not decoded": lambda work: data_set(work).cast_column("image", Image(decode=False)),
    "stream": lambda work: data_set(work).to_iterable_dataset(),
    "saved": lambda work: f"hfds/{work / 'saved'}",
    "parquet": lambda work: f"hfds/{work / 'parquet'}",
    "pictures": lambda work: [Pillow.open(path) for path in paths(work)],
    "samples": samples,
    "another key": lambda work: samples(work, "photo"),
    "generator": lambda work: (sample for sample in samples(work)),
    "list batches": lambda work: DataLoader(data_set(work), 4, collate_fn=lambda batch: batch),
    "mapping batches": lambda work: data_set(work).iter(batch_size=4),
    "pairs": lambda work: iter([([Pillow.open(path) for path in paths(work)], list(range(COUNT)))]),
    "webdataset": lambda work: webdataset.WebDataset(str(work / "all.tar"), shardshuffle=False).select(
        lambda sample: "MACOSX" not in sample["__key__"]
    ),
    "decoded webdataset": lambda work: (
        webdataset.WebDataset(str(work / "all.tar"), shardshuffle=False)
        .select(lambda sample: "MACOSX" not in sample["__key__"])
        .decode("pil")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(work, expected, form):
    assert torch.equal(everything(FORMS[form](work)), expected)


def test_prepared_images_come_through_and_batches_keep_their_labels(expected):
    labels = torch.arange(COUNT)
    assert torch.equal(everything(TensorDataset(expected, labels)), expected)
    ready = data_set_of(expected)
    assert torch.equal(everything(ready), expected)
    batches = opened([{"pixel_values": expected, "labels": labels}], CONFIG, 4)
    assert [found.tolist() for _, found in batches] == [[0, 1, 2, 3]]


def data_set_of(images):
    """One whose transform prepares the images, as a processor of transformers does."""
    found = Dataset.from_dict({"number": list(range(len(images)))})
    return found.with_transform(lambda rows: {"pixel_values": [images[number] for number in rows["number"]]})


def test_no_form_but_batches_has_labels(work):
    for form in ("nested", "tar", "datasets", "samples", "generator"):
        assert {labels for _, labels in opened(FORMS[form](work), CONFIG, 100)} == {None}, form


def test_the_limit_and_processes(work, expected):
    """Of what is found by number evenly spread, of an iterable the first."""
    for form in ("text", "tar", "datasets", "samples"):
        assert torch.equal(everything(FORMS[form](work), limit=3), expected[::2]), form
    for form in ("generator", "stream", "list batches"):
        assert torch.equal(everything(FORMS[form](work), limit=3), expected[:3]), form
    for form in ("tar", "datasets"):
        assert torch.equal(everything(FORMS[form](work), workers=2), expected), form


def test_loaders_are_run_through_again(work, expected):
    loader = opened(work / "all.tar", CONFIG, 100)
    assert len(loader) == 1
    for _ in range(2):
        assert torch.equal(torch.cat([batch for batch, _ in loader]), expected)


def test_recovery_reads_the_same_forms(work, expected):
    for form in ("nested", "tar", "datasets", "generator"):
        found = images_in(FORMS[form](work), torch.nn.Identity(), CONFIG, 100)
        assert torch.equal(found, expected.half()), form
    with pytest.raises(StrataViTError, match="2"):
        images_in(work / "flat", torch.nn.Identity(), CONFIG, 1)


@pytest.mark.parametrize("form", ["paths", "tar", "datasets", "samples", "generator"])
def test_damaged_images_are_left_out_and_counted(work, tmp_path, expected, capsys, form):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = FORMS[form](work)
    if form == "paths":
        images = [*images[:2], bad, tmp_path / "none.png", *images[2:]]
    elif form == "tar":
        archive(tmp_path / "all.tar", [*paths(work), bad])
        images = tmp_path / "all.tar"
    elif form == "datasets":
        columns = {"image": [str(path) for path in (*paths(work), bad)]}
        images = Dataset.from_dict(columns).cast_column("image", Image())
    else:
        raw = {"png": bad.read_bytes()}
        images = [*images, raw] if form == "samples" else iter([*images, raw])
    assert torch.equal(everything(images), expected)
    assert f"left out {2 if form == 'paths' else 1} unreadable images" in capsys.readouterr().err


def broken(work, tmp_path, form):
    """Images of a form that are refused."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tar").write_bytes((work / "all.tar").read_bytes()[:700])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(work / "flat/0.png")
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        tar.add(work / "flat/list.txt", "list.txt")
    (tmp_path / "splits/birds/train").mkdir(parents=True)
    (tmp_path / "splits/birds/val").mkdir()
    Pillow.new("RGB", (8, 8)).save(tmp_path / "splits/birds/train/0.png")
    return {
        "no folder": tmp_path / "none",
        "no tar file": tmp_path / "none.tar",
        "missing shard": [tmp_path / "none.tar"],
        "an empty folder": tmp_path / "empty",
        "a tar file without images": tmp_path / "bare.tar",
        "half a tar file": tmp_path / "cut.tar",
        "a compressed one": tmp_path / "packed.tar",
        "splits inside": tmp_path / "splits",
        "no data set": f"hfds/{tmp_path / 'none'}",
        "no images in it": f"hfds/{tmp_path / 'empty'}",
        "an empty list": [],
        "an empty data set": Dataset.from_dict({"image": []}),
        "several splits": DatasetDict(a=data_set(work), b=data_set(work)),
        "no pictures": Dataset.from_dict({"text": ["a", "b"]}),
        "two pictures": [{"before": Pillow.new("L", (8, 8)), "after": Pillow.new("L", (8, 8))}],
        "numbers": [1, 2],
        "a number": 5,
        "a mapping": {"a": 1},
    }[form]


@pytest.mark.parametrize(
    "form",
    [
        *("no folder", "no tar file", "missing shard", "an empty folder", "a tar file without images"),
        *("half a tar file", "a compressed one", "splits inside", "no data set", "no images in it", "an empty list"),
        *("an empty data set", "several splits", "no pictures", "two pictures", "numbers", "a number", "a mapping"),
    ],
)
def test_what_is_refused(work, tmp_path, form):
    """In one sentence, with what was given in it where it has a name."""
    images = broken(work, tmp_path, form)
    with pytest.raises(StrataViTError) as error:
        everything(images)
    assert "\n" not in str(error.value)
    if not isinstance(images, list | dict | int) and str(tmp_path) in str(images):
        assert str(images).removeprefix("hfds/") in str(error.value)


def test_a_missing_place_is_found_without_reading(tmp_path, work):
    for images in (tmp_path / "none", str(tmp_path / "none.tar")):
        with pytest.raises(StrataViTError, match="is not a folder"):
            check_there(images)
    for images in (work / "flat", work / "all.tar", "hfds/anything", [tmp_path / "none"], 5):
        check_there(images)


def test_datasets_is_needed_for_names_only(work, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(StrataViTError, match=r"stratavit\[datasets\]"):
        everything("hfds/beans")
    assert len(everything(work / "flat")) == COUNT


def test_the_split_to_use():
    assert which_split(["test", "train"]) == "train"
    assert which_split(["validation", "Training"]) == "Training"
    assert which_split(["test"]) == "test"
    for names in ([], ["a", "b"]):
        with pytest.raises(StrataViTError):
            which_split(names)


def test_a_shard_s_split_is_in_its_name(work):
    kinds = {
        "imagenet-train-0000": "train",
        "val_00": "val",
        "test": "test",
        "val-0-of-12": "val",
        "0001": None,
        "contest-12": None,
    }
    assert {stem: unlabelled._kind(work / f"{stem}.tar") for stem in kinds} == kinds
