"""To the hub and back through huggingface_hub itself, against a hub on this machine; and model cards."""

import copy
import json

import pytest
import timm
import torch
import yaml
from fake_hub import fake_hub
from helpers import CLASSES, FAMILIES, make_batches, make_images, make_net

import stratavit
from stratavit import ArtifactError, BudgetError, StrataViTError, SuperNet, from_pretrained, push_to_hub
from stratavit.artifacts.timm_config import needs_stratavit
from stratavit.cli.parser import main
from stratavit.data.class_names import set_class_names
from stratavit.evaluation import curve_points
from stratavit.reports.model_card import model_card
from stratavit.utils.text import human

NAME = "someone/thing"
IMAGES = make_images(3, seed=4)


@pytest.fixture
def hub():
    with fake_hub() as found:
        yield found


def get(hub, tmp_path, name=NAME, **options):
    return from_pretrained(name, endpoint=hub.url, cache_dir=tmp_path / "cache", verbose=False, **options)


def push(hub, model, name=NAME, **options):
    return push_to_hub(model, name, endpoint=hub.url, token="secret", **options)


def files(hub):
    return hub.repos[NAME].keys() - {".gitattributes"}


def test_a_super_network_there_and_back_at_any_size(hub, net, tmp_path):
    assert push(hub, net, private=True, licence="apache-2.0") == f"{hub.url}/{NAME}"
    assert hub.private == {NAME}
    whole = {"README.md", "config.json", "model.safetensors", "moments.safetensors", "stratavit.json"}
    assert files(hub) == whole
    back, spec = get(hub, tmp_path), net.spec(macs=0.5)
    with torch.no_grad():
        expected = net.extract(spec=spec)(IMAGES)
        assert torch.equal(back(IMAGES), net(IMAGES))
        assert torch.equal(back(IMAGES, spec), net(IMAGES, spec))
        for size in ({"spec": spec}, {"macs": 0.5, "memory_mb": 100}):
            small = get(hub, tmp_path, **size)
            assert not isinstance(small, SuperNet)
            assert torch.equal(small(IMAGES), expected)
        within = get(hub, tmp_path, max_drop=100, data=make_batches())
    assert sum(p.numel() for p in within.parameters()) == net.params(net.strata.smallest())
    with pytest.raises(BudgetError, match="reachable range"):
        get(hub, tmp_path, macs=3)


def test_a_sub_network_there_and_back(hub, net, points, tmp_path):
    """It leaves nothing of another model that was there."""
    push(hub, net, points=points)
    assert "curve.png" in files(hub)
    small = net.extract(macs=0.5, verbose=False)
    push(hub, small)
    assert files(hub) == {"README.md", "config.json", "model.safetensors", "stratavit.json"}
    with torch.no_grad():
        assert torch.equal(get(hub, tmp_path)(IMAGES), small(IMAGES))
    with pytest.raises(BudgetError, match=NAME):
        get(hub, tmp_path, macs=0.5)


def test_a_folder_there_and_back(hub, net, points, tmp_path):
    """What was uploaded from a folder, and a folder in place of the hub's name."""
    net.save(tmp_path / "run")
    curve_points.write_csv(points, tmp_path / "run" / "curve.csv")
    push(hub, tmp_path / "run", moments=False)
    assert {"curve.png", "README.md"} < files(hub)
    assert len(hub.repos[NAME]["moments.safetensors"]) < (tmp_path / "run" / "moments.safetensors").stat().st_size
    assert from_pretrained(tmp_path / "run", moments=False).memory().moments == 0
    with torch.no_grad():
        for found in (from_pretrained(tmp_path / "run"), get(hub, tmp_path)):
            assert torch.equal(found(IMAGES), net(IMAGES))
    with pytest.raises(StrataViTError, match="'gpu'"):
        from_pretrained(tmp_path / "run", device="gpu")


def test_failures_are_one_sentence(hub, net, tmp_path):
    with pytest.raises(ArtifactError, match=r"^'someone/thing' is neither a local folder [^\n]*$"):
        get(hub, tmp_path)
    with pytest.raises(ArtifactError, match="'not a name!'"):
        get(hub, tmp_path, name="not a name!")
    hub.repos[NAME] = {"README.md": b"nothing of ours"}
    with pytest.raises(ArtifactError, match=r"stratavit\.json is missing|is not a folder"):
        get(hub, tmp_path)
    with pytest.raises(ArtifactError, match="public"):  # is not mistaken for a private one
        push(hub, net, private=True)
    for name in ("not/a/name", "spaced name", ""):
        with pytest.raises(ArtifactError, match=r"^cannot upload to '[^\n]*$"):
            push(hub, net, name)
    hub.refuse = 400
    with pytest.raises(ArtifactError, match=r"^cannot upload to 'someone/thing': [^\n]*refused[^\n]*$"):
        push(hub, net)


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_card_of_a_super_network(net, points):
    net = copy.deepcopy(net)
    net.provenance["source"] = {"model": "deit_tiny_patch16_224", "weights": None}
    card = model_card(net, NAME, points, "mit")
    about = front_matter(card)
    assert (about["license"], about["library_name"]) == ("mit", "stratavit")
    assert {"stratavit", "super-network"} <= set(about["tags"])
    for words in ("deit_tiny_patch16_224", f'from_pretrained("{NAME}", macs="50%")', f"hf-hub:{NAME}", '"images": '):
        assert words in card
    for point in points:
        assert f"{point.share:.1%}" in card
        assert f"{point.top1:.2f} | {point.top5:.2f}" in card


def test_the_card_of_a_sub_network_and_cards_without_measurements(net, points):
    small = net.extract(macs=0.5, verbose=False)
    card = model_card(small, NAME, points)
    assert f"{human(net.params(net.spec(macs=0.5)))} parameters. Widths: blocks.0.attn" in card
    assert "## The super-network that it comes from" in card
    small.provenance["super_network"] = {"source": "a friend"}
    assert "`a friend`" in model_card(small, NAME)
    for model in (net, small):
        card = model_card(model, NAME)
        assert "Accuracy was not measured." in card
        assert "Not stated. It follows that of the source weights." in card
        assert "license" not in front_matter(card)
    assert "import stratavit\nimport timm" in model_card(small, NAME)
    assert 'macs="50%"' not in model_card(make_net("plain"), NAME)  # no list yet


def test_the_card_names_base_model_and_classes(net, tmp_path):
    net = copy.deepcopy(net)
    assert "base_model" not in front_matter(model_card(net, NAME))
    assert "## Classes" not in model_card(net, NAME)
    net.provenance["source"] = {"model": "m", "weights": None, "base_model": "timm/m.tag"}
    set_class_names(net, [f"kind {number}" for number in range(CLASSES)])
    small = net.extract(macs=0.5, verbose=False)
    for model in (net, small):
        assert front_matter(model_card(model, NAME))["base_model"] == "timm/m.tag"
        assert front_matter(model_card(model, NAME, base_model="me/other"))["base_model"] == "me/other"
        assert f"{CLASSES}, in the order of the head: kind 0, kind 1" in model_card(model, NAME)
    net.save(tmp_path / "run")
    push = ["push", str(tmp_path / "run"), NAME, "--dry-run", str(tmp_path / "shown"), "--base-model"]
    assert main([*push, "me/other"]) == 0
    assert front_matter((tmp_path / "shown/README.md").read_text())["base_model"] == "me/other"
    assert main([*push, "not a name", "--overwrite"]) == 2


def test_a_card_leaves_out_sizes_that_cannot_be_had(net, monkeypatch):
    monkeypatch.setattr("stratavit.reports.model_card.SHARES", ("12/12", "0/12"))
    text = model_card(net, NAME)
    assert "| 12/12 |" in text
    assert "| 0/12 |" not in text


def test_push_and_dry_run_by_command(hub, net, points, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    net.save(tmp_path / "run")
    curve_points.write_csv(points, tmp_path / "curve.csv")
    push, shown = ["push", str(tmp_path / "run"), NAME], tmp_path / "shown"
    assert main([*push, "--curve", str(tmp_path), "--endpoint", hub.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": f"{hub.url}/{NAME}"}
    assert main([*push, "--license", "mit", "--dry-run", str(shown)]) == 0
    assert front_matter((shown / "README.md").read_text())["license"] == "mit"
    for options, words in ((["--dry-run", str(shown)], "--overwrite"), (["--curve", str(shown)], "holds no curve.csv")):
        assert main([*push, *options]) == 2
        assert words in capsys.readouterr().err


def test_timm_loads_towers_with_norms_of_their_own(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_base_patch16_clip_224", **sizes).eval()  # eps 1e-5
    SuperNet(model).save(tmp_path / "run")
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()(IMAGES)
        assert torch.equal(found, model(IMAGES))


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_alone_loads_what_its_terms_can_say(family, tmp_path):
    """All else it loads, too, but by the name that this library registers."""
    net = make_net(family, stratified=True)
    net.save(tmp_path / "run")
    half = {name: width // 2 for name, width in net.resolve(None).items() if name.endswith("mlp")}
    even = net.extract(spec=half)
    stratavit.save(even, tmp_path / "even")
    uneven = net.extract(spec={"blocks.0.mlp": 8})
    stratavit.save(uneven, tmp_path / "uneven")
    ours = {"uneven"}
    if family == "no_bias":  # what is cut leaves a bias behind, which timm's terms do not give to some layers only
        ours.add("even")
    for name, source in (("run", net), ("even", even), ("uneven", uneven)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert needs_stratavit(config) is (name in ours)
        model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(model(IMAGES), source(IMAGES))
        found, expected = (json.dumps(one) for one in (timm.data.resolve_model_data_config(model), net.data_config))
        assert json.loads(found) == json.loads(expected)
