"""Small models loaded by timm's and transformers' own loaders, from the folders that `stratavit.save` writes."""

import json
import subprocess
import sys
from functools import partial

import architectures
import pytest
import timm
import torch
from fake_hub import fake_hub
from helpers import CLASSES, MIXED, make_images, make_model, make_net
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import resample_abs_pos_embed

import stratavit
from stratavit import ArtifactError, StrataViTError, SuperNet
from stratavit.artifacts.timm_config import needs_stratavit
from stratavit.interop.supported import rows
from stratavit.interop.timm_name import NAME
from stratavit.reports.hub import write_upload
from stratavit.reports.model_card import model_card

IMAGES = make_images(2, seed=9)
LOADED = (*architectures.KINDS, "deit_tiny_distilled_patch16_224", architectures.TORCHVISION)


def uneven(name):
    """A small model of timm's form with a width of its own at every site, one of them 0."""
    net = SuperNet(architectures.make(name)).contract([IMAGES])
    spec = {site.name: max(1, site.width // (2 + number % 3)) for number, site in enumerate(net.sites)}
    return stratavit.as_timm(net.extract(spec=spec | {net.sites[1].name: 0}, verbose=False))


def from_timm(folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same(one, other, images=IMAGES):
    with torch.no_grad():
        return torch.equal(one(images), other(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small"
    stratavit.save(make_net("plain").extract(spec=MIXED, verbose=False), path)
    return path


@pytest.fixture
def edited(folder, tmp_path):
    """Writes another folder, its ``config.json`` changed by a function of ``model_args``."""

    def write(edit):
        config = config_of(folder)
        edit(config["model_args"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        return tmp_path

    return write


# ---- timm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_timm_loads_any_small_model(name, tmp_path):
    """With the same outputs and preparation of images, bit for bit; and what it loaded is described as before."""
    small = uneven(name)
    stratavit.save(small, tmp_path / "small")
    assert needs_stratavit(config_of(tmp_path / "small"))
    found = from_timm(tmp_path / "small")
    assert same(found, small)
    content, again = tmp_path / "small" / "stratavit.json", tmp_path / "again" / "stratavit.json"
    stratavit.save(found, again.parent)
    for key in ("model", "data_config"):
        assert json.loads(again.read_text())[key] == json.loads(content.read_text())[key]


def test_timm_loads_models_that_merge_tokens(tmp_path):
    small = make_net("plain").extract(spec={"blocks.0.tokens": 9, "blocks.1.mlp": 5}, verbose=False)
    stratavit.save(small, tmp_path / "small")
    found = from_timm(tmp_path / "small")
    assert same(found, small)
    with torch.no_grad():
        assert not torch.equal(found(IMAGES), make_net("plain")(IMAGES, {"blocks.1.mlp": 5}))


@pytest.mark.parametrize("imports", ["import stratavit, timm", "import timm, stratavit"])
def test_the_order_of_imports_does_not_matter(imports, folder):
    """And looking whether timm is there, as transformers does, neither loads it nor undoes the registration."""
    code = (
        "import importlib.util, sys\n"
        f"{imports.partition(',')[0]}\nimportlib.util.find_spec('timm')\n{imports}\n"
        "for one in (*sys.meta_path, timm.__loader__, timm.__spec__.loader):\n"
        "    assert not type(one).__module__.startswith('stratavit')\n"
        f"assert timm.create_model('local-dir:{folder}', pretrained=True).blocks[0].mlp.is_constant\n"
        f"assert timm.is_model({NAME!r})\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_a_stock_model_needs_no_stratavit(tmp_path):
    half = {name: width // 2 for name, width in make_net("plain").resolve(None).items() if name.endswith("mlp")}
    small = make_net("plain").extract(spec=half, verbose=False)
    stratavit.save(small, tmp_path / "small")
    with torch.no_grad():
        save_file({"images": IMAGES, "outputs": small(IMAGES)}, tmp_path / "outputs.safetensors")
    code = (
        "import sys; sys.modules['stratavit'] = None\n"
        "import timm, torch; from safetensors.torch import load_file\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "model, run = timm.create_model('local-dir:small', pretrained=True).eval(), load_file('outputs.safetensors')\n"
        "with torch.no_grad(): assert torch.equal(model(run['images']), run['outputs'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_timm_loads_from_the_hub(tmp_path, monkeypatch):
    """By its own download, here from a hub on this machine; the card has the lines."""
    small = make_net("plain").extract(spec=MIXED, verbose=False)
    with fake_hub() as hub:
        stratavit.push_to_hub(small, "someone/small", endpoint=hub.url, token="secret")
        assert not [name for name in hub.repos["someone/small"] if name.endswith((".bin", ".pth", ".pt", ".pkl"))]
        download = partial(hf_hub_download, endpoint=hub.url, cache_dir=tmp_path)
        monkeypatch.setattr(
            "timm.models._hub.hf_hub_download", lambda *args, **options: download(*args, **options | download.keywords)
        )
        assert same(timm.create_model("hf-hub:someone/small", pretrained=True).eval(), small)
        assert 'timm.create_model("hf-hub:someone/small"' in hub.repos["someone/small"]["README.md"].decode()
        del hub.repos["someone/small"]["model.safetensors"]
        with pytest.raises(Exception, match=r"pytorch_model\.bin"):  # the last name that timm looks for
            timm.create_model("hf-hub:someone/small", pretrained=True, cache_dir=tmp_path / "other")


def test_the_card_says_when_stratavit_is_needed():
    net = make_net("plain")
    half = {name: width // 2 for name, width in net.resolve(None).items() if name.endswith("mlp")}
    for spec, needed in ((MIXED, True), (half, False)):
        card = model_card(net.extract(spec=spec, verbose=False), "someone/small")
        assert 'timm.create_model("hf-hub:someone/small"' in card
        assert ("import stratavit\nimport timm" in card) is needed


def test_arguments_of_timm_work_as_usual(folder):
    small = stratavit.load(folder)
    other = from_timm(folder, num_classes=CLASSES + 2, drop_path_rate=0.1)
    assert other.head.out_features == CLASSES + 2
    assert torch.equal(other.blocks[1].mlp.fc1.weight, small.blocks[1].mlp.fc1.weight)
    assert from_timm(folder, in_chans=1)(IMAGES[:, :1]).shape == (2, CLASSES)
    assert next(from_timm(folder, dtype=torch.float64).parameters()).dtype == torch.float64
    assert next(timm.create_model(f"local-dir:{folder}", device="meta").parameters()).is_meta
    features = from_timm(folder, features_only=True, out_indices=(0, 1))(IMAGES)
    assert [one.shape for one in features] == [(2, 32, 4, 4)] * 2
    large = from_timm(folder, img_size=48)
    assert large(make_images(2).repeat(1, 1, 2, 2)[:, :, :48, :48]).shape == (2, CLASSES)
    assert torch.equal(large.pos_embed, resample_abs_pos_embed(small.pos_embed, [6, 6], num_prefix_tokens=1))


def test_without_weights_a_model_is_new(folder):
    assert not same(timm.create_model(f"local-dir:{folder}").eval(), stratavit.load(folder))


# ---- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda args: args["stratavit"].update(format_version=2), "format version 2"),
        (lambda args: args.pop("stratavit"), "local-dir:FOLDER"),
        (lambda args: args["stratavit"].pop("sites"), "sites"),
        (lambda args: args["stratavit"].update(architecture="vit_of_tomorrow"), "vit_of_tomorrow"),
        (lambda args: args.update(checkpoint_path="weights.pth"), "checkpoint_path"),
        (lambda args: args.update(embed_dim=1 << 40), "embed_dim"),
    ],
)
def test_a_config_that_cannot_be_built_is_one_sentence(edited, edit, words):
    with pytest.raises(ArtifactError, match=words):
        from_timm(edited(edit))


def test_the_name_alone_says_what_to_do():
    with pytest.raises(ArtifactError, match="local-dir:FOLDER"):
        timm.create_model(NAME)
    with pytest.raises(StrataViTError, match="no model that matches"):
        rows("stratavit*")


def test_weights_are_loaded_strictly(edited, folder):
    path = edited(lambda args: None) / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.bias"}, path)
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        from_timm(path.parent)
    save_file(tensors | {"more": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match="more"):
        from_timm(path.parent)
    path.unlink()
    with pytest.raises(RuntimeError, match="No suitable checkpoints"):
        from_timm(path.parent)


def test_the_folder_of_a_super_network_is_its_full_size(tmp_path):
    """Also where a module of the model is not what timm builds from its arguments."""
    for number, model in enumerate((make_model("plain"), uneven("vit_tiny_patch16_224"))):
        net = SuperNet(model).contract([IMAGES])
        net.save(tmp_path / str(number))
        assert needs_stratavit(config_of(tmp_path / str(number))) is bool(number)
        assert same(from_timm(tmp_path / str(number)), net)


# ---- transformers -------------------------------------------------------------------------------------------------


def auto(folder, labels=True):
    import transformers

    kind = transformers.AutoModelForImageClassification if labels else transformers.AutoModel
    return kind.from_pretrained(folder, trust_remote_code=False).eval()


@pytest.mark.parametrize("name", architectures.KINDS)
def test_transformers_loads_any_small_model_by_timm(name, tmp_path):
    """By its class for timm's models, also where attention computes buffers when it is built."""
    import transformers

    small = uneven(name)
    stratavit.save(small, tmp_path)
    found, labels = auto(tmp_path, small.num_classes > 0), small.num_classes > 0
    with torch.no_grad():
        output = found(IMAGES)
        assert torch.equal(output.logits if labels else output.pooler_output, small(IMAGES))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert tuple(processor.data_config["input_size"]) == tuple(small.data_config["input_size"])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassification", "Dinov2Model"])
def test_transformers_own_classes_load_equal_widths(name, tmp_path):
    net = SuperNet(architectures.make(name)).contract([IMAGES])
    small = net.extract(spec={site.name: site.width // 2 for site in net.sites}, verbose=False)
    small.save_pretrained(tmp_path)
    found = auto(tmp_path, name != "Dinov2Model")
    assert type(found) is type(small)
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(found(IMAGES)[:], small(IMAGES)[:], strict=True))
    assert stratavit.load_transformers(tmp_path).config.head_dim == found.config.head_dim


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SwinForImageClassification"])
def test_transformers_own_classes_load_equal_mlps(name, tmp_path):
    """Where the class reads no head width."""
    net = SuperNet(architectures.make(name)).contract([IMAGES])
    for half, loads in ((True, True), (False, False)):
        spec = {site.name: site.width // 2 for site in net.sites if site.name.endswith("mlp") or not half}
        small = net.extract(spec=spec, verbose=False)
        small.save_pretrained(tmp_path)
        if loads:
            assert type(auto(tmp_path, "Image" in name)) is type(small)
        else:
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                auto(tmp_path, "Image" in name)


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
def test_no_class_of_ours_reads_widths_by_layer(name):
    """Else they could be written there: see `stated_widths`."""
    model = architectures.make(name)
    field = "intermediate_size" if hasattr(model.config, "intermediate_size") else "mlp_ratio"
    fields = model.config.to_dict() | {"per_layer_config": {"0": {field: 3}}}
    if name == "SwinForImageClassification":
        fields["num_hidden_layers"] = 2  # of which it has none of its own
    assert shapes_from(type(model), fields) in (None, shapes_of(model))


def shapes_from(kind, fields):
    """Shapes that a class builds from a configuration; None if it refuses it."""
    try:
        return shapes_of(kind(kind.config_class.from_dict(fields)))
    except (AttributeError, RuntimeError, ValueError):
        return None


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_a_small_model_of_transformers_is_pushed_in_timms_form(tmp_path):
    net = SuperNet(architectures.make("ViTForImageClassification")).contract([IMAGES])
    small = net.extract(spec={net.sites[1].name: 5}, verbose=False)
    for number, source in enumerate((small, tmp_path / "0")):
        out = write_upload(source, tmp_path / str(number), "someone/small")
        assert type(stratavit.load(out)) is type(small)
        assert same(from_timm(out), stratavit.as_timm(small))
