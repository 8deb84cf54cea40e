"""Folders of transformers and names of torchvision on the command line: in, sliced, and out again."""

import json
import shutil
from pathlib import Path

import architectures
import pytest
import torch
from helpers import CLASSES, Bomb, enliven, make_images, relative_error
from PIL import Image
from safetensors.torch import save_file

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.artifacts.model_loading import model_at
from stratavit.cli.parser import main
from stratavit.interop.equivalence import tensor_of
from stratavit.interop.transformers.folders import PROCESSOR, load_equivalent

FAST = ["--batch-size", "6", "--workers", "0", "--device", "cpu"]
HEADED = "ViTForImageClassification"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for name in range(CLASSES):
            (folder / split / str(name)).mkdir(parents=True)
            pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / split / str(name) / "0.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class of transformers -> folder that its save_pretrained wrote."""
    root = tmp_path_factory.mktemp("sources")
    for name in architectures.TRANSFORMERS:
        architectures.make(name).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
def test_a_folder_of_transformers_is_timms_equivalent(folders, name):
    source, images = architectures.make(name), make_images(3, seed=9)
    with torch.no_grad():
        assert relative_error(model_at(str(folders / name))(images), tensor_of(source(images))) < 1e-5


@pytest.mark.parametrize("name", [HEADED, "Dinov2Model"])
def test_the_whole_way_by_command_line(folders, images, name, tmp_path, capsys):
    """convert, extract, export as transformers; that folder is measured, and converted, like any other."""
    measure = ["--knn", "1"] if name == "Dinov2Model" else []
    assert main(["convert", str(folders / name), "--data", str(images), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert main(["extract", str(tmp_path / "run"), "--macs", "60%", "--out", str(tmp_path / "small")]) == 0
    assert main(["export", str(tmp_path / "small"), "--format", "transformers", "--device", "cpu"]) == 0
    exported = tmp_path / "small-transformers"
    small, back = stratavit.load(tmp_path / "small"), stratavit.load_transformers(exported)
    assert type(back) is type(small) is type(architectures.make(name))
    assert back.config.stratavit == small.config.stratavit
    pixels = make_images(3, seed=9)
    with torch.no_grad():
        assert torch.equal(tensor_of(back(pixels)), tensor_of(small(pixels)))
    capsys.readouterr()
    found = []
    for target in (tmp_path / "small", exported):
        assert main(["evaluate", str(target), "--data", str(images), *FAST, *measure, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert main(["convert", str(exported), "--data", str(images), "--out", str(tmp_path / "again"), *FAST]) == 0


def test_the_processor_is_kept(folders, tmp_path):
    """Mean, std, crop and interpolation go out and come in again, and a processor that resizes to the very size."""
    shutil.copytree(folders / HEADED, tmp_path / "source")
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "source" / PROCESSOR).write_text(json.dumps(numbers | {"size": {"height": 32, "width": 32}}))
    model = load_equivalent(tmp_path / "source")
    expected = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    assert model.data_config.items() >= (expected | {"crop_pct": 1.0, "crop_mode": "squash"}).items()
    stratavit.export(model, tmp_path / "squash", "transformers")
    assert load_equivalent(tmp_path / "squash").data_config == model.data_config
    model.data_config |= {"crop_pct": 32 / 40, "crop_mode": "center"}
    parity = stratavit.export(model, tmp_path / "crop", "transformers")
    assert parity.difference == 0
    assert load_equivalent(tmp_path / "crop").data_config == model.data_config


@pytest.mark.parametrize(
    "content",
    ['{"image_mean": 3}', '{"size": 7}', '{"size": {"shortest_edge": "big"}}', "[]", "{", '{"image_std": ["x"]}'],
)
def test_a_bad_processor_is_one_sentence(folders, tmp_path, content):
    shutil.copytree(folders / HEADED, tmp_path / "source")
    (tmp_path / "source" / PROCESSOR).write_text(content)
    with pytest.raises(ArtifactError, match="preprocessor_config") as caught:
        load_equivalent(tmp_path / "source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "expected a model of one of ViTForImage"),
        ({"model_type": "nonsense"}, "not a model of transformers"),
        ({"architectures": None}, "expected a model of one of"),
        ({"hidden_size": 48}, "cannot be loaded"),
        ({"hidden_size": "wide"}, "not a model of transformers"),
        ({"num_hidden_layers": 3}, "the weights lack vit"),
        ({"stratavit": {"widths": 3}}, "cannot be loaded"),
        ({"stratavit": {"widths": {}}}, "cannot be loaded"),
    ],
)
def test_a_bad_folder_of_transformers_is_one_sentence(folders, tmp_path, change, words):
    shutil.copytree(folders / HEADED, tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ArtifactError, match=words) as caught:
        load_equivalent(tmp_path / "source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled"])
def test_damaged_weights_of_transformers(folders, tmp_path, damage):
    shutil.copytree(folders / HEADED, tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        weights.unlink()
    if damage == "pickled":
        torch.save({"classifier.bias": Bomb(tmp_path / "exploded")}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(
        ArtifactError, match=r"source: the ViTForImageClassification there cannot be loaded|safetensors is damaged"
    ) as caught:
        load_equivalent(tmp_path / "source")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_only_models_of_transformers_become_folders_of_it(tmp_path):
    model = architectures.make("deit_tiny_patch16_224")
    with pytest.raises(StrataViTError, match="models that came from there"):
        stratavit.export(model, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(folders, tmp_path):
    model = load_equivalent(folders / HEADED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("here")
    with pytest.raises(ArtifactError, match="not empty"):
        stratavit.export(model, tmp_path / "out", "transformers")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    stratavit.export(model, tmp_path / "out", "transformers", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_torchvision_by_name(monkeypatch, tmp_path):
    """A state dict of torchvision, by file and as downloaded; what does not fit is named."""
    import torchvision

    made = enliven(architectures.make(architectures.TORCHVISION)).eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: made)
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    pixels = make_images(3, seed=9)
    for weights in (None, tmp_path / "w.safetensors"):
        with torch.no_grad():
            assert relative_error(model_at("vit_b_16", weights)(pixels), made(pixels)) < 1e-5
    assert model_at("vit_b_16", num_classes=5).head.out_features == 5
    save_file({"odd": torch.zeros(2)}, tmp_path / "bad.safetensors")
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: class_token is missing"):
        model_at("vit_b_16", tmp_path / "bad.safetensors")


def test_torchvision_without_a_network(monkeypatch):
    import torchvision

    def get_model(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    with pytest.raises(StrataViTError, match="weights of vit_b_16: no route; give a local checkpoint"):
        model_at("vit_b_16")


def test_the_names_are_torchvisions():
    import torchvision

    from stratavit.interop.torchvision_vit import NAMES

    assert sorted(NAMES) == sorted(name for name in torchvision.models.list_models() if name.startswith("vit_"))


CONFIG = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def sliced(name, **options):
    """A small model of a class of transformers."""
    source = architectures.make(name)
    net = stratavit.SuperNet(source, **options).contract([make_images()]).eval()
    return net.extract(spec={site.name: max(1, site.width // 2) for site in net.sites}, verbose=False)


@pytest.mark.parametrize("name", [HEADED, "Dinov2Model", "CLIPVisionModel"])
def test_a_small_model_keeps_what_was_said_of_it(name, tmp_path):
    """Data configuration, provenance and embedding pass through files, timm's form and a second conversion."""
    small = sliced(name, data_config=CONFIG, embedding=True)
    stratavit.save(small, tmp_path / "small")
    for model in (stratavit.as_timm(small), stratavit.load(tmp_path / "small"), stratavit.SuperNet(small)):
        assert model.data_config.items() >= CONFIG.items()
        assert model.embedding
    assert small.provenance
    assert stratavit.load(tmp_path / "small").provenance == small.provenance


def test_attention_stays_eager():
    source = architectures.make(HEADED)
    source.set_attn_implementation("eager")
    small = stratavit.SuperNet(source).extract(spec={"blocks.1.attn": 0}, verbose=False)
    assert len(small(make_images(1), output_attentions=True).attentions) == 1  # one of two layers has attention left


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("SwinForImageClassification", {"hidden_act": "relu"}),
        ("SwinForImageClassification", {"image_size": 36}),
        ("SwinForImageClassification", {"window_size": 6}),
        ("SwinForImageClassification", {"layer_norm_eps": 1e-3}),
        ("SwinForImageClassification", {"use_absolute_embeddings": True}),
        ("SiglipVisionModel", {"vision_use_head": False}),
        ("ViTForImageClassification", {"hidden_act": "mish"}),
    ],
)
def test_what_timm_computes_otherwise_is_refused(name, change):
    import transformers

    config = architectures.make(name).config.to_dict() | change
    kind = getattr(transformers, name)
    with pytest.raises(StrataViTError, match=f"cannot cut this {name}: "):
        stratavit.as_timm(enliven(kind(kind.config_class.from_dict(config))).eval())


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
@pytest.mark.parametrize("gone", ["attn", "mlp"])
def test_transformers_alone_does_not_fill_cut_modules_at_random(name, gone, tmp_path):
    """Its own loader refuses the folder, though all the tensors that are left have their stock shape."""
    net = stratavit.SuperNet(architectures.make(name))
    site = [site.name for site in net.sites if site.name.endswith(gone)][-1]
    small = net.extract(spec={site: 0}, verbose=False)
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(small).from_pretrained(tmp_path)
    with torch.no_grad():
        images = make_images(2)
        assert torch.equal(tensor_of(stratavit.load_transformers(tmp_path)(images)), tensor_of(small(images)))


def test_a_new_head_is_loaded_and_exported(folders, images, tmp_path):
    pytest.importorskip("accelerate")
    few = tmp_path / "few"
    for name in ("0", "1"):
        shutil.copytree(images / "train" / name, few / "train" / name)
    stratavit.save(sliced(HEADED), tmp_path / "small")
    short = ["--epochs", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--tracker", "none"]
    command = ["finetune", str(tmp_path / "small"), "--new-head", "--data", str(few), "--out", str(tmp_path / "tuned")]
    assert main([*command, *short]) == 0
    tuned = stratavit.load(tmp_path / "tuned")
    assert tuned.config.num_labels == 2
    assert main(["export", str(tmp_path / "tuned"), "--format", "transformers"]) == 0


def test_finetune_and_knn_take_models_of_transformers():
    pytest.importorskip("accelerate")
    small = sliced(HEADED)
    data = torch.utils.data.TensorDataset(make_images(8), torch.arange(8) % CLASSES)
    recipe = {"epochs": 1, "batch_size": 4, "workers": 0, "tracker": "none", "repeats": 1}
    tuned = stratavit.finetune(small, data, config=recipe, cpu=True)
    assert type(tuned) is type(small)
    assert tuned.config.stratavit == small.config.stratavit
    assert stratavit.knn(small, [data[:]], [data[:]], k=1).top1 == 100


DINO = {"image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True, "do_normalize": True}
DINO |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_rescale": True}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "Dinov2Model",
            DINO | {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
            {"input_size": (3, 16, 16), "crop_pct": 16 / 20, "crop_mode": "center"},
        ),
        (
            "DeiTForImageClassification",
            DINO
            | {"image_processor_type": "DeiTImageProcessor", "size": {"height": 36, "width": 36}}
            | {"crop_size": {"height": 32, "width": 32}},
            {"input_size": (3, 32, 32), "crop_mode": "squash"},
        ),
        (
            "CLIPVisionModel",
            DINO | {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
            {"crop_pct": 1.0, "crop_mode": "center"},
        ),
        (
            HEADED,
            {"image_processor_type": "ViTImageProcessor", "size": 32, "do_normalize": False},
            {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_mode": "squash"},
        ),
    ],
)
def test_images_are_prepared_as_the_processor_does(folders, tmp_path, name, settings, expected):
    import transformers
    from timm.data import create_transform

    shutil.copytree(folders / name, tmp_path / "source")
    (tmp_path / "source" / PROCESSOR).write_text(json.dumps(settings))
    config = load_equivalent(tmp_path / "source").data_config
    assert config.items() >= expected.items()
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (48, 48), mode="bicubic").clamp(0, 1)
    image = Image.fromarray((255 * smooth[0].permute(1, 2, 0)).byte().numpy())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "source")
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = create_transform(**config, is_training=False)(image)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_resize": False}, "resized and rescaled"),
        ({"do_rescale": False}, "resized and rescaled"),
        ({"crop_size": {"height": 16, "width": 16}}, "makes images of 16 x 16, the model reads 32 x 32"),
        ({"size": {"shortest_edge": 20}}, "larger than what it is cut from"),
        ({"size": {"height": 64, "width": 40}}, "not the same part"),
        ({"size": {"longest_edge": 64}}, "height and width, or of the shortest edge"),
        ({"resample": 5}, "resample .* is none of"),
    ],
)
def test_a_processor_that_timm_has_no_words_for_is_refused(folders, tmp_path, change, words):
    shutil.copytree(folders / HEADED, tmp_path / "source")
    plain = DINO | {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "source" / PROCESSOR).write_text(json.dumps(plain | change))
    with pytest.raises(ArtifactError, match=words):
        load_equivalent(tmp_path / "source")


def test_a_class_name_of_any_length_is_told_in_short(folders, tmp_path):
    """Fuzzing found."""
    shutil.copytree(folders / HEADED, tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"architectures": ["x\n" * 3000]}))
    with pytest.raises(ArtifactError, match="expected a model of one of") as told:
        load_equivalent(tmp_path / "source")
    assert len(str(told.value)) < 500
    assert str(told.value).isprintable()


def test_a_release_with_other_names_is_refused(monkeypatch):
    """In a sentence that names the bound which the package declares, not by an attribute that is missing."""
    from stratavit.interop.transformers.models import OLDEST, library

    bound = ".".join(map(str, OLDEST))
    assert f'"transformers>={bound}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    model = architectures.make("ViTForImageClassification")
    monkeypatch.setattr(library(), "__version__", "5.8.1")
    with pytest.raises(StrataViTError, match=rf"need release {bound} or newer of it, found 5\.8\.1: pip install"):
        SuperNet(model)
