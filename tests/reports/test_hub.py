"""To the hub and back through huggingface_hub itself, against a hub on this machine; and cards that tell the truth."""

import copy
import json

import pytest
import timm
import torch
import yaml
from fake_hub import fake_hub
from helpers import FAMILIES, make_batches, make_images, make_net

import stratavit
from stratavit import ArtifactError, BudgetError, StrataViTError, SuperNet, from_pretrained, push_to_hub
from stratavit.cli.parser import main
from stratavit.evaluation import curve_points
from stratavit.reports import curve
from stratavit.reports.model_card import model_card
from stratavit.utils.text import human

NAME = "someone/thing"
IMAGES = make_images(3, seed=4)


@pytest.fixture
def hub():
    with fake_hub() as found:
        yield found


@pytest.fixture
def net():
    return make_net("plain", stratified=True)


def get(hub, tmp_path, name=NAME, **options):
    return from_pretrained(name, endpoint=hub.url, cache_dir=tmp_path / "cache", verbose=False, **options)


def test_a_super_network_there_and_back(hub, net, tmp_path):
    url = push_to_hub(net, NAME, endpoint=hub.url, token="secret", private=True, licence="apache-2.0")
    assert url == f"{hub.url}/{NAME}"
    assert hub.private == {NAME}
    files = {"README.md", "config.json", "model.safetensors", "moments.safetensors", "stratavit.json"}
    assert hub.repos[NAME].keys() - {".gitattributes"} == files
    back = get(hub, tmp_path)
    assert isinstance(back, SuperNet)
    with torch.no_grad():
        assert torch.equal(back(IMAGES), net(IMAGES))
        for spec in (net.spec(macs=0.7), net.spec(macs=0.4)):
            assert torch.equal(back(IMAGES, spec), net(IMAGES, spec))


def test_any_size_at_load_time(hub, net, tmp_path):
    push_to_hub(net, NAME, endpoint=hub.url, token="secret")
    spec = net.spec(macs=0.5)
    with torch.no_grad():
        expected = net.extract(spec=spec)(IMAGES)
        for size in ({"macs": "50%"}, {"spec": spec}, {"macs": 0.5, "memory_mb": 100}):
            small = get(hub, tmp_path, **size)
            assert not isinstance(small, SuperNet)
            assert torch.equal(small(IMAGES), expected)
        within = get(hub, tmp_path, max_drop=100, data=make_batches())
    assert sum(p.numel() for p in within.parameters()) == net.params(net.strata.spec(len(net.strata)))
    with pytest.raises(BudgetError, match="reachable range"):
        get(hub, tmp_path, macs=3)


def test_a_sub_network_there_and_back(hub, net, tmp_path):
    small = net.extract(macs=0.5, verbose=False)
    push_to_hub(small, NAME, endpoint=hub.url, token="secret")
    assert "config.json" not in hub.repos[NAME]  # widths of its own: timm's terms do not say them
    back = get(hub, tmp_path)
    with torch.no_grad():
        assert torch.equal(back(IMAGES), small(IMAGES))
    with pytest.raises(BudgetError, match=f"{NAME} has one size only"):
        get(hub, tmp_path, macs=0.5)


def test_a_folder_there_and_back(hub, net, tmp_path):
    """What was uploaded from a folder, and a folder in place of the hub's name."""
    net.save(tmp_path / "run")
    curve_points.write_csv(curve.curve(net, make_batches(), ("12/12", "6/12")), tmp_path / "run" / "curve.csv")
    push_to_hub(tmp_path / "run", NAME, endpoint=hub.url, token="secret", moments=False)
    assert {"curve.png", "README.md"} < hub.repos[NAME].keys()
    assert len(hub.repos[NAME]["moments.safetensors"]) < (tmp_path / "run" / "moments.safetensors").stat().st_size
    with torch.no_grad():
        expected = net(IMAGES)
        assert torch.equal(from_pretrained(tmp_path / "run")(IMAGES), expected)
        assert torch.equal(get(hub, tmp_path)(IMAGES), expected)


def test_failures_are_one_sentence(hub, net, tmp_path):
    with pytest.raises(ArtifactError, match=r"^cannot get 'someone/thing' from the hub, nor is it a folder: [^\n]*$"):
        get(hub, tmp_path)
    with pytest.raises(ArtifactError, match="nor is it a folder"):
        get(hub, tmp_path, name="not a name!")
    hub.repos[NAME] = {"README.md": b"nothing of ours"}
    with pytest.raises(ArtifactError, match=r"stratavit\.json is missing|is not a folder"):
        get(hub, tmp_path)
    for name in ("not/a/name", "spaced name", ""):
        with pytest.raises(ArtifactError, match=r"^cannot upload to '[^\n]*$"):
            push_to_hub(net, name, endpoint=hub.url, token="secret")
    hub.refuse = 400
    with pytest.raises(ArtifactError, match=r"^cannot upload to 'someone/thing': [^\n]*refused[^\n]*$"):
        push_to_hub(net, NAME, endpoint=hub.url, token="secret")


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_card_of_a_super_network(net):
    net = copy.deepcopy(net)
    net.provenance["source"] = {"model": "deit_tiny_patch16_224", "weights": None}
    points = curve.curve(net, make_batches(), ("12/12", "8/12", "6/12"))
    card = model_card(net, NAME, points, "mit")
    about = front_matter(card)
    assert (about["license"], about["library_name"]) == ("mit", "stratavit")
    assert {"stratavit", "super-network"} <= set(about["tags"])
    assert "deit_tiny_patch16_224" in card
    assert f'from_pretrained("{NAME}", macs="50%")' in card
    assert f"hf-hub:{NAME}" in card
    for point in points:
        assert f"{point.share:.1%}" in card
        assert f"{point.top1:.2f} | {point.top5:.2f}" in card
    assert '"images": ' in card  # provenance


def test_a_card_without_measurements_says_so(net):
    small = net.extract(macs=0.5, verbose=False)
    for model in (net, small):
        card = model_card(model, NAME)
        assert "Accuracy was not measured." in card
        assert "Not stated. It follows that of the source weights." in card
        assert "license" not in front_matter(card)
    assert "hf-hub" not in model_card(small, NAME)
    assert 'macs="50%"' not in model_card(make_net("plain"), NAME)  # no list yet


def test_the_card_of_a_sub_network_tells_its_own_size(net):
    small = net.extract(macs=0.5, verbose=False)
    card = model_card(small, NAME, curve.curve(net, make_batches(), ("12/12", "6/12")))
    assert f"{human(net.params(net.spec(macs=0.5)))} parameters. Widths: blocks.0.attn" in card
    assert "## The super-network that it comes from" in card
    small.provenance["super_network"] = {"source": "a friend"}
    assert "`a friend`" in model_card(small, NAME)


def test_another_model_leaves_nothing_behind(hub, net, tmp_path):
    push_to_hub(net, NAME, points=curve.curve(net, make_batches(), ("12/12",)), endpoint=hub.url, token="secret")
    push_to_hub(net.extract(macs=0.5, verbose=False), NAME, endpoint=hub.url, token="secret")
    assert hub.repos[NAME].keys() - {".gitattributes"} == {"README.md", "model.safetensors", "stratavit.json"}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, net):
    push_to_hub(net, NAME, endpoint=hub.url, token="secret")
    with pytest.raises(ArtifactError, match="there already, and public"):
        push_to_hub(net, NAME, endpoint=hub.url, token="secret", private=True)


def test_a_device_that_is_not_there(net, tmp_path):
    net.save(tmp_path / "run")
    with pytest.raises(StrataViTError, match="device 'gpu' is not available here"):
        from_pretrained(tmp_path / "run", device="gpu")
    assert from_pretrained(tmp_path / "run", moments=False).memory().moments == 0


def test_towers_with_norms_of_their_own_have_a_config_too(tmp_path):
    name = "vit_base_patch16_clip_224"  # eps 1e-5
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    SuperNet(model).save(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(
            timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()(IMAGES), model(IMAGES)
        )


def test_push_and_dry_run_by_command(hub, net, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    net.save(tmp_path / "run")
    curve_points.write_csv(curve.curve(net, make_batches(), ("12/12",)), tmp_path / "curve.csv")
    assert main(["push", str(tmp_path / "run"), NAME, "--curve", str(tmp_path), "--endpoint", hub.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": f"{hub.url}/{NAME}"}
    shown = tmp_path / "shown"
    command = ["push", str(tmp_path / "run"), NAME, "--license", "mit", "--dry-run", str(shown)]
    assert main(command) == 0
    assert front_matter((shown / "README.md").read_text())["license"] == "mit"
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "run"), NAME, "--curve", str(tmp_path / "run")]) == 2
    assert "holds no curve.csv" in capsys.readouterr().err


def as_json(content):
    return json.loads(json.dumps(content))


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_loads_what_its_terms_can_say(family, tmp_path):
    net = make_net(family, stratified=True)
    net.save(tmp_path / "run")
    half = {name: width // 2 for name, width in net.resolve(None).items() if name.endswith("mlp")}
    stratavit.save(net.extract(spec=half), tmp_path / "even")
    stratavit.save(net.extract(spec={"blocks.0.mlp": 8}), tmp_path / "uneven")
    sayable = [("run", net), ("even", net.extract(spec=half))]
    if family == "no_bias":  # what is cut leaves a bias behind, which timm's terms do not give to some layers only
        assert not (tmp_path / sayable.pop()[0] / "config.json").exists()
    for name, source in sayable:
        model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(model(IMAGES), source(IMAGES))
        assert as_json(timm.data.resolve_model_data_config(model)) == as_json(net.data_config)
    assert not (tmp_path / "uneven" / "config.json").exists()
