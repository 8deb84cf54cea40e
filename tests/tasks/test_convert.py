"""One call: the same as its steps and as the command, on images in any form."""

import copy
import tarfile

import pytest
import torch
from command_line import MODEL, make_folder, output, refusal, small_models
from helpers import CLASSES, make_batches, make_images, make_model, same_tensors
from PIL import Image

import stratavit
from stratavit import BudgetError, StrataViTError
from stratavit.data.image_folder import image_loader
from stratavit.dropout_list.walk import Walk

COUNT = 12


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images in a flat folder, in three class folders, in as many as the model has classes, and in a tar file."""
    folder = make_folder(tmp_path_factory.mktemp("convert"), ["a", "b", "c"], train=4)
    folder.joinpath("train").rename(folder / "three")
    paths = sorted(folder.glob("three/*/*.png"))
    (folder / "flat").mkdir()
    for number, path in enumerate(paths):
        place = folder / "classes/train" / f"class{number % CLASSES}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        for copied in (folder / "flat" / f"{number:02}.png", place):
            copied.write_bytes(path.read_bytes())
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "flat", "flat")
    return folder


@pytest.fixture(scope="module")
def model():
    return make_model("plain")


def flat(work):
    return sorted((work / "flat").iterdir())


def batches(work, model):
    """Of the flat folder, as a user's own loader makes them."""
    config = stratavit.SuperNet(model).data_config
    loader = image_loader(work / "three", config, "train", None)
    return [(images,) for images, _ in loader]


@pytest.fixture(scope="module")
def expected(work, model):
    found = batches(work, model)
    return stratavit.SuperNet(model).contract(found).stratify(found)


def assert_same_net(net, other):
    assert same_tensors(net.model.state_dict(), other.model.state_dict())
    assert net.strata.entries == other.strata.entries
    assert net.provenance["stratify"] == other.provenance["stratify"]


@pytest.mark.parametrize(
    "form",
    {
        "flat": lambda work: work / "flat",
        "nested": lambda work: str(work / "three"),
        "paths": flat,
        "tar": lambda work: work / "all.tar",
        "data set": lambda work: [{"image": Image.open(path), "label": 1} for path in flat(work)],
        "generator": lambda work: (Image.open(path) for path in flat(work)),
    }.items(),
    ids=lambda form: form[0],
)
def test_weights_and_list_are_the_same_whatever_the_form(work, model, expected, form):
    assert_same_net(stratavit.convert(model, form[1](work), verbose=False), expected)


def test_a_loader_is_read_as_contract_reads_it(work, model, expected):
    assert_same_net(stratavit.convert(model, batches(work, model), verbose=False), expected)
    labelled = [(images, torch.arange(len(images)) % CLASSES) for (images,) in batches(work, model)]
    net = stratavit.convert(model, iter(labelled), verbose=False)
    assert_same_net(net, stratavit.SuperNet(model).contract(labelled).stratify(labelled))
    assert not same_tensors(net.model.state_dict(), expected.model.state_dict())


def test_labels_are_used_where_the_folders_are_the_model_s_classes(work, model, capsys):
    net = stratavit.convert(model, work / "classes")
    loader = image_loader(work / "classes", net.data_config, "train", CLASSES)
    assert_same_net(net, stratavit.SuperNet(model).contract(loader).stratify(loader))
    assert "dense top-1" in capsys.readouterr().err
    assert net.provenance["dense"]["n"] == COUNT


def test_labels_that_are_asked_for_must_fit(work, model, tmp_path):
    (tmp_path / "map.txt").write_text("a\nb\nc")
    for images, options in (
        (work / "three", {"objective": "label"}),
        (work / "flat", {"objective": "cross_entropy"}),
        (work / "three", {"class_map": tmp_path / "map.txt"}),
        (work / "all.tar", {"class_map": tmp_path / "map.txt"}),
        (work / "all.tar", {"objective": "label"}),
    ):
        with pytest.raises(StrataViTError):
            stratavit.convert(model, images, verbose=False, **options)


def test_the_command_is_the_call(work, tmp_path, capsys):
    options = {"method": "paper", "seed": 3, "limit": 8, "device": "cpu"}
    with small_models():
        arguments = ["--method", "paper", "--seed", 3, "--images", 8, "--device", "cpu", "--workers", 0]
        got = output(capsys, "convert", MODEL, "--data", work / "flat", "--out", tmp_path / "run", *arguments)
        net = stratavit.convert(MODEL, work / "flat", verbose=False, **options)
    net.save(tmp_path / "ours")
    for file in ("model.safetensors", "stratavit.json"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    assert (got["images"], got["dense"], got["unreadable"]) == (8, None, 0)
    assert net.provenance["source"] == {"model": MODEL, "weights": None, **base_model(net)}


def base_model(net):
    hub_id = net.model.pretrained_cfg.get("hf_hub_id")
    return {"base_model": hub_id} if hub_id else {}


def test_compress_is_convert_and_extract(work, model, expected, capsys):
    before = copy.deepcopy(model.state_dict())
    small = stratavit.compress(model, work / "flat", macs=0.6)
    said = capsys.readouterr().err
    assert all(word in said for word in ("images", "any size from", "asked", "got", "reachable"))
    with torch.no_grad():
        images = make_images(3)
        assert torch.equal(small(images), expected.extract(macs=0.6, verbose=False)(images))
    assert same_tensors(model.state_dict(), before)
    stratavit.compress(model, work / "flat", params="60%", verbose=False)
    assert capsys.readouterr().err == ""


def test_compress_can_merge_tokens(work, model):
    found = batches(work, model)
    net = stratavit.SuperNet(model).contract(found).stratify(found, axes=("width", "tokens"))
    small = stratavit.compress(model, flat(work), macs=0.6, axes="both", verbose=False)
    expected = net.extract(macs=0.6, axes="both", verbose=False)
    assert small.provenance["spec"] == expected.provenance["spec"]
    assert "blocks.1.tokens" in small.provenance["spec"]
    with torch.no_grad():
        assert torch.equal(small(make_images(3)), expected(make_images(3)))


def test_compress_keeps_the_library(work):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    source = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=CLASSES)).eval()
    small = stratavit.compress(source, work / "flat", macs=0.6, verbose=False)
    assert isinstance(small, ViTForImageClassification)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in source.parameters())


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (BudgetError, {}),
        (BudgetError, {"macs": "5o%"}),
        (BudgetError, {"flops": 0.5}),
        (BudgetError, {"max_drop": 2}),
        (StrataViTError, {"macs": 0.5, "method": "papers"}),
        (StrataViTError, {"macs": 0.5, "limit": 0}),
    ],
)
def test_mistakes_are_found_before_any_work(model, error, options):
    """The images would be refused, too, if they were looked at."""
    with pytest.raises(error) as found:
        stratavit.compress(model, "no such folder", **options)
    assert "no such folder" not in str(found.value)


def test_what_must_not_change_is_passed_on(work, model):
    net = stratavit.convert(model, work / "flat", ignore=["blocks.0.*"], min_width={"blocks.1.mlp": 16}, verbose=False)
    smallest = net.strata.smallest()
    assert smallest["blocks.0.attn"] == net.resolve(None)["blocks.0.attn"]
    assert smallest["blocks.1.mlp"] >= 16
    assert smallest["blocks.1.attn"] == 0
    with pytest.raises(StrataViTError, match="ignore"):
        stratavit.convert(model, work / "flat", ignore=["nothing.*"], verbose=False)


@pytest.mark.parametrize("options", [{"objective": "labels"}, {"axes": "tokens"}, {"price": "time"}])
def test_options_of_convert_are_checked_first(model, options):
    with pytest.raises(StrataViTError, match=next(iter(options))):
        stratavit.convert(model, "no such folder", **options)
    with pytest.raises(StrataViTError, match="weights"):
        stratavit.convert(model, [torch.zeros(1)], weights="x.safetensors")


def test_images_that_cannot_be_read(work, model, tmp_path, capsys):
    net = stratavit.convert(model, [tmp_path / "none.png", *flat(work)], verbose=False)
    assert net.provenance["contract"]["images"] == COUNT
    assert "left out 1 unreadable images" in capsys.readouterr().err
    with pytest.raises(StrataViTError, match="no images"):
        stratavit.convert(model, [tmp_path / "none.png", tmp_path / "gone.png"], verbose=False)


def test_a_flat_folder_on_the_command_line(work, tmp_path, capsys):
    """No class folders are asked for, and a line says that accuracy is not looked at."""
    with small_models():
        small = ["--workers", "0", "--device", "cpu"]
        for images in ("flat", "three", "all.tar"):
            got = output(capsys, "convert", MODEL, "--data", work / images, "--out", tmp_path / images, *small)
            assert (got["images"], got["dense"]) == (COUNT, None)
        line = refusal(capsys, "convert", MODEL, "--data", tmp_path / "none", "--out", tmp_path / "x", *small)
        assert "is not a folder" in line
        labelled = ["--objective", "label", "--data", work / "three"]
        assert "--class-map" in refusal(capsys, "convert", MODEL, "--out", tmp_path / "x", *labelled, *small)
    assert not (tmp_path / "x").exists()


def test_few_images_make_all_steps(expected):
    """They are faster, not fewer: fewer steps gave worse small networks."""
    assert expected.provenance["stratify"]["walk"]["states"] == [list(state) for state in Walk().states]


def test_whole_heads_and_the_papers_method_do_not_go_together():
    with pytest.raises(StrataViTError, match="method"):
        stratavit.convert(make_model("plain"), make_batches(), whole_heads=True, method="paper", verbose=False)


def test_merging_places_without_a_list_that_merges_are_refused_before_the_model_is_made():
    with pytest.raises(StrataViTError, match="merging_places"):
        stratavit.convert("no_such_model", make_batches(), merging_places=2, verbose=False)
