"""Folders of transformers and names of torchvision: in, sliced, and out again."""

import json
import shutil
from pathlib import Path

import architectures
import pytest
import torch
from helpers import CLASSES, Bomb, enliven, make_images, relative_error
from image_folders import write_images
from PIL import Image
from safetensors.torch import save_file

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.artifacts.model_loading import model_at
from stratavit.cli.parser import main
from stratavit.interop.timm_equivalent import tensor_of
from stratavit.interop.torchvision_vit import NAMES
from stratavit.interop.transformers.folders import PROCESSOR, load_equivalent
from stratavit.interop.transformers.models import OLDEST, library

FAST = ["--batch-size", "6", "--workers", "0", "--device", "cpu"]
HEADED = "ViTForImageClassification"
IMAGES = make_images(3, seed=9)


def outputs(model):
    with torch.no_grad():
        return tensor_of(model(IMAGES))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class of transformers -> folder that its save_pretrained wrote."""
    root = tmp_path_factory.mktemp("sources")
    for name in architectures.TRANSFORMERS:
        architectures.make(name).save_pretrained(root / name)
    return root


@pytest.fixture
def source(folders, tmp_path):
    """A folder to change."""
    return shutil.copytree(folders / HEADED, tmp_path / "source")


def sliced(name, **options):
    """A small model of a class of transformers."""
    net = SuperNet(architectures.make(name), **options).contract([make_images()]).eval()
    return net.extract(spec={site.name: max(1, site.width // 2) for site in net.sites}, verbose=False)


def refused(source, words):
    """In one short, printable line."""
    with pytest.raises(ArtifactError, match=words) as caught:
        load_equivalent(source)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


# ---- transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HEADED, "Dinov2Model"])
def test_the_full_way_by_command_line(folders, images, name, tmp_path, capsys):
    """convert, extract, export as transformers; that folder is measured, and converted, like any other."""
    measure = ["--knn", "1"] if name == "Dinov2Model" else []
    assert main(["convert", str(folders / name), "--data", str(images), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert main(["extract", str(tmp_path / "run"), "--macs", "60%", "--out", str(tmp_path / "small")]) == 0
    assert main(["export", str(tmp_path / "small"), "--format", "transformers", "--device", "cpu"]) == 0
    exported = tmp_path / "small-transformers"
    small, back = stratavit.load(tmp_path / "small"), stratavit.load_transformers(exported)
    assert type(back) is type(small) is type(architectures.make(name))
    assert back.config.stratavit == small.config.stratavit
    assert torch.equal(outputs(back), outputs(small))
    capsys.readouterr()
    found = []
    for target in (tmp_path / "small", exported):
        assert main(["evaluate", str(target), "--data", str(images), *FAST, *measure, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1].pop("model") == str(target)
    assert found[0] == found[1]
    assert main(["convert", str(exported), "--data", str(images), "--out", str(tmp_path / "again"), *FAST]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel"),
        ({"model_type": "nonsense"}, "source: "),
        ({"architectures": None}, HEADED),
        ({"architectures": ["x\n" * 3000]}, HEADED),
        ({"hidden_size": 48}, HEADED),
        ({"num_hidden_layers": 3}, r"vit\.layers\.2"),
        ({"stratavit": {"widths": {}}}, HEADED),
    ],
)
def test_a_bad_folder_is_one_sentence(source, change, words):
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(source, words)


def test_missing_and_pickled_weights(source, tmp_path):
    """Damaged ones are among hostile files."""
    (source / "model.safetensors").unlink()
    refused(source, HEADED)
    torch.save({"classifier.bias": Bomb(tmp_path / "exploded")}, source / "pytorch_model.bin")
    refused(source, HEADED)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_that_is_taken_is_left_alone(folders, tmp_path):
    model = load_equivalent(folders / HEADED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("here")
    with pytest.raises(ArtifactError, match="not empty"):
        stratavit.export(model, tmp_path / "out", "transformers")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    parity = stratavit.export(model, tmp_path / "out", "transformers", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert parity.size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", [HEADED, "CLIPVisionModel"])
def test_a_small_model_keeps_what_was_said_of_it(name, tmp_path):
    """Data configuration, provenance and embedding pass through files, timm's form and a second conversion."""
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    small = sliced(name, data_config=config, embedding=True)
    stratavit.save(small, tmp_path / "small")
    for model in (stratavit.as_timm(small), stratavit.load(tmp_path / "small"), SuperNet(small)):
        assert model.data_config.items() >= config.items()
        assert model.embedding
    assert small.provenance
    assert stratavit.load(tmp_path / "small").provenance == small.provenance


def test_attention_stays_eager():
    source = architectures.make(HEADED)
    source.set_attn_implementation("eager")
    small = SuperNet(source).extract(spec={"blocks.1.attn": 0}, verbose=False)
    assert len(small(make_images(1), output_attentions=True).attentions) == 1  # one of two layers has attention left


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("SwinForImageClassification", {"hidden_act": "relu"}),
        ("SwinForImageClassification", {"window_size": 6}),
        ("SwinForImageClassification", {"layer_norm_eps": 1e-3}),
        ("SwinForImageClassification", {"use_absolute_embeddings": True}),
        ("SiglipVisionModel", {"vision_use_head": False}),
        ("ViTForImageClassification", {"hidden_act": "mish"}),
    ],
)
def test_what_timm_computes_differently_is_refused(name, change):
    import transformers

    config = architectures.make(name).config.to_dict() | change
    kind = getattr(transformers, name)
    with pytest.raises(StrataViTError, match=f"cannot cut this {name}: "):
        stratavit.as_timm(enliven(kind(kind.config_class.from_dict(config))).eval())


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
def test_transformers_alone_does_not_fill_cut_modules_at_random(name, tmp_path):
    """Its own loader refuses the folder, though all the tensors that are left have their stock shape."""
    net = SuperNet(architectures.make(name))
    for site in net.sites[-2:]:
        small = net.extract(spec={site.name: 0}, verbose=False)
        small.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(small).from_pretrained(tmp_path)
        assert torch.equal(outputs(stratavit.load_transformers(tmp_path)), outputs(small))
        assert relative_error(outputs(model_at(str(tmp_path))), outputs(small)) < 1e-5


def test_a_new_head_is_loaded_and_exported(tmp_path):
    model = stratavit.as_timm(sliced(HEADED))
    model.reset_classifier(2)
    stratavit.save(model, tmp_path / "tuned")
    tuned = stratavit.load(tmp_path / "tuned")
    assert tuned.config.num_labels == 2
    stratavit.export(tuned, tmp_path / "out", "transformers")
    assert stratavit.load_transformers(tmp_path / "out").classifier.out_features == 2


def test_finetune_and_knn_accept_models_of_transformers():
    pytest.importorskip("accelerate")
    small = sliced(HEADED)
    data = torch.utils.data.TensorDataset(make_images(8), torch.arange(8) % CLASSES)
    recipe = {"epochs": 1, "batch_size": 4, "workers": 0, "tracker": "none", "repeats": 1}
    tuned = stratavit.finetune(small, data, config=recipe, cpu=True)
    assert type(tuned) is type(small)
    assert tuned.config.stratavit == small.config.stratavit
    assert stratavit.knn(small, [data[:]], [data[:]], k=1).top1 == 100


def test_a_release_with_other_names_is_refused(monkeypatch):
    """In a sentence that names the bound which the package declares, not by an attribute that is missing."""
    bound = ".".join(map(str, OLDEST))
    assert f'"transformers>={bound}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    model = architectures.make(HEADED)
    monkeypatch.setattr(library(), "__version__", "5.8.1")
    with pytest.raises(StrataViTError, match=rf"{bound} .*5\.8\.1: pip install"):
        SuperNet(model)


# ---- image processors -------------------------------------------------------------------------------------------

PLAIN = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3, "do_rescale": True}
PLAIN |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def square(side):
    return {"height": side, "width": side}


def test_the_processor_is_kept(source, tmp_path):
    """Mean, std, crop and interpolation go out and come in again, and a processor that resizes to the very size."""
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (source / PROCESSOR).write_text(json.dumps(numbers | {"size": {"height": 32, "width": 32}}))
    model = load_equivalent(source)
    expected = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    assert model.data_config.items() >= (expected | {"crop_pct": 1.0, "crop_mode": "squash"}).items()
    stratavit.export(model, tmp_path / "squash", "transformers")
    assert load_equivalent(tmp_path / "squash").data_config == model.data_config
    model.data_config |= {"crop_pct": 32 / 40, "crop_mode": "center"}
    assert stratavit.export(model, tmp_path / "crop", "transformers").difference == 0
    assert load_equivalent(tmp_path / "crop").data_config == model.data_config


PREPARED = {  # class of the processor -> of the model, settings, timm's
    "BitImageProcessor": (
        "Dinov2Model",
        PLAIN | {"size": {"shortest_edge": 20}, "crop_size": square(16)},
        {"input_size": (3, 16, 16), "crop_pct": 16 / 20, "crop_mode": "center"},
    ),
    "DeiTImageProcessor": (
        "DeiTForImageClassification",
        PLAIN | {"size": square(36), "crop_size": square(32)},
        {"input_size": (3, 32, 32), "crop_mode": "squash"},
    ),
    "CLIPImageProcessor": (
        "CLIPVisionModel",
        PLAIN | {"size": 32, "crop_size": 32},
        {"crop_pct": 1.0, "crop_mode": "center"},
    ),
    "ViTImageProcessor": (
        HEADED,
        {"size": 32, "do_normalize": False},
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_mode": "squash"},
    ),
}


@pytest.mark.parametrize("kind", PREPARED)
def test_images_are_prepared_as_the_processor_does(folders, tmp_path, kind):
    import transformers
    from timm.data import create_transform

    name, settings, expected = PREPARED[kind]
    shutil.copytree(folders / name, tmp_path / "source")
    (tmp_path / "source" / PROCESSOR).write_text(json.dumps(settings | {"image_processor_type": kind}))
    config = load_equivalent(tmp_path / "source").data_config
    assert config.items() >= expected.items()
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (48, 48), mode="bicubic").clamp(0, 1)
    image = Image.fromarray((255 * smooth[0].permute(1, 2, 0)).byte().numpy())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "source")
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = create_transform(**config, is_training=False)(image)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 0.05


def test_a_processor_that_timm_has_no_counterpart_of_is_refused(source):
    plain = PLAIN | {"image_processor_type": "BitImageProcessor"}
    plain |= {"size": {"shortest_edge": 36}, "crop_size": square(32)}
    for change, words in (
        ({"do_resize": False}, "resized and rescaled"),
        ({"do_rescale": False}, "resized and rescaled"),
        ({"crop_size": square(16)}, "16 x 16, .* 32 x 32"),
        ({"size": {"shortest_edge": 20}}, "crop"),
        ({"size": {"height": 64, "width": 40}}, "crop"),
        ({"size": {"longest_edge": 64}}, "shortest edge"),
        ({"resample": 5}, "resample: "),
        ({"image_mean": 3}, PROCESSOR),
        ([], PROCESSOR),
    ):
        content = plain | change if change else change
        (source / PROCESSOR).write_text(json.dumps(content))
        refused(source, words)


# ---- torchvision ------------------------------------------------------------------------------------------------


def test_torchvision_by_name(monkeypatch, tmp_path):
    """A state dict of torchvision, by file and as downloaded; what does not fit is named."""
    import torchvision

    assert sorted(NAMES) == sorted(name for name in torchvision.models.list_models() if name.startswith("vit_"))
    made = enliven(architectures.make(architectures.TORCHVISION)).eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: made)
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    for weights in (None, tmp_path / "w.safetensors"):
        assert relative_error(outputs(model_at("vit_b_16", weights)), outputs(made)) < 1e-5
    assert model_at("vit_b_16", num_classes=5).head.out_features == 5
    save_file({"odd": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: class_token"):
        model_at("vit_b_16", tmp_path / "bad.safetensors")

    def get_model(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    with pytest.raises(StrataViTError, match=r"vit_b_16: no route; .*--weights"):
        model_at("vit_b_16")
