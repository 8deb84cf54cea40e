"""`SuperNet`: what holds for the object users hold, across its parts."""

import copy
import json

import pytest
import timm
import torch
from helpers import PLAN, make_batches, make_model, make_net

import stratavit
from stratavit import StrataViTError, SuperNet

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}


def test_main_job_end_to_end(source, batches, images):
    """Contract, stratify, extract at a budget: within it, smaller, and equal to the elastic prefix."""
    before, net = copy.deepcopy(source.state_dict()), SuperNet(source)
    assert net.contract(batches).stratify(batches, plan=PLAN) is net
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert type(source.blocks[0].attn).__module__.startswith("timm")
    spec, small = net.spec(macs=0.6), net.extract(macs=0.6, verbose=False)
    assert net.macs(spec) <= 0.6 * net.macs()
    with torch.no_grad():
        torch.testing.assert_close(small(images), net(images, spec), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(images), source(images), rtol=1e-4, atol=1e-4)


def test_units_set_what_a_list_cuts(tmp_path):
    net = SuperNet(make_model("plain")).contract(make_batches())
    net.stratify(make_batches(), plan=PLAN).set_units(4, 8)
    assert net.strata is None
    net.stratify(make_batches(), plan=PLAN)
    assert {entry.width % 4 for entry in net.strata.entries if entry.site.endswith("attn")} == {0}
    assert {entry.width % 8 for entry in net.strata.entries if entry.site.endswith("mlp")} == {0}
    assert 4 in {entry.width for entry in net.strata.entries}
    net.save(tmp_path / "run")
    read = SuperNet.load(tmp_path / "run")
    assert (read.units, read.sites, read.strata.entries) == (net.units, net.sites, net.strata.entries)
    entries = net.strata.entries
    net.set_units(4, 8)
    assert net.strata.entries == entries
    for wrong in ((0, 8), (4, 1.5), (True, 8)):
        with pytest.raises(StrataViTError, match=r"head_dim_unit|mlp_units"):
            net.set_units(*wrong)
    content = json.loads((tmp_path / "run" / "stratavit.json").read_text())
    content["units"] = [0, 8]
    del content["hashes"]
    (tmp_path / "run" / "stratavit.json").write_text(json.dumps(content))
    with pytest.raises(stratavit.ArtifactError, match="units"):
        SuperNet.load(tmp_path / "run")


def test_stratify_without_contract_leaves_the_weights_alone(source, batches):
    net = SuperNet(source).stratify(batches, plan=PLAN)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.model.state_dict().items())
    assert len(net.strata) == sum(len(site.steps) - 1 for site in net.sites)
    assert all(module.channel_mean.numel() == module.out.in_features for module in net.elastic.values())


def test_stratify_is_deterministic_and_does_not_need_labels(batches):
    lists = [SuperNet(make_model("plain")).stratify(loader).strata.entries for loader in (batches, batches)]
    assert lists[0] == lists[1]
    assert len(SuperNet(make_model("plain")).stratify([images for images, _ in batches]).strata) == len(lists[0])


def test_contract_again_drops_the_old_list(batches):
    net = copy.deepcopy(make_net("plain", stratified=True))
    assert net.strata is not None
    assert net.final_mean is not None
    assert net.contract(batches).strata is None
    assert net.final_mean is None


def test_a_failed_stratify_leaves_the_network_as_it_was(batches):
    net = copy.deepcopy(make_net("plain", stratified=True))
    entries, mean = net.strata.entries, net.final_mean
    for method in ("paper", "default"):
        with pytest.raises(StrataViTError, match="no images"):
            net.stratify([], method=method)
        assert (net.strata.entries, net.method, net.compensation) == (entries, "default", "full")
        assert net.final_mean is mean


@pytest.mark.parametrize(
    ("options", "method"), [({}, "default"), ({"method": "paper"}, "paper"), ({"criterion": "wpac"}, "paper")]
)
def test_a_criterion_implies_paper_and_stratify_keeps_the_method(batches, options, method):
    net = SuperNet(make_model("plain")).contract(batches, **options)
    assert net.method == method
    assert net.stratify(batches).method == method
    assert {module.compensation for module in net.elastic.values()} == {"none" if method == "paper" else "full"}


@pytest.mark.parametrize(("method", "criterion"), [("paper", "output"), ("default", "wpac")])
def test_a_method_that_contradicts_the_criterion_is_refused(batches, method, criterion):
    with pytest.raises(StrataViTError, match=criterion):
        SuperNet(make_model("plain")).contract(batches, method=method, criterion=criterion)


def test_provenance_is_plain_and_says_how_it_was_made(batches):
    paper = (
        SuperNet(make_model("plain")).contract(batches, criterion="random", seed=3).stratify(batches, measure="cost")
    )
    made, listed = paper.provenance["contract"], paper.provenance["stratify"]
    assert (made["criterion"], made["method"], made["seed"], made["images"]) == ("random", "paper", 3, 12)
    assert (listed["measure"], listed["images"]) == ("cost", 12)
    assert listed["sensitivity"].keys() == paper.elastic.keys()
    net = SuperNet(make_model("plain")).contract(batches, token_weight=0.3).stratify(batches, plan=PLAN)
    made, listed = net.provenance["contract"], net.provenance["stratify"]
    assert (made["criterion"], made["method"], made["token_weight"]) == ("output", "default", 0.3)
    assert [share for share, _ in listed["states"]] == [share for share, _ in PLAN.states]
    assert listed["walk"]["images"] == PLAN.images
    json.dumps([paper.provenance, net.provenance])


@pytest.mark.parametrize("name", ["compensation", "method"])
def test_unknown_options_are_refused(name):
    with pytest.raises(StrataViTError, match=name):
        setattr(make_net("plain"), name, "half")


def test_weights_that_are_not_finite_are_refused_by_name():
    model = make_model("plain")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("inf")
    with pytest.raises(StrataViTError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        SuperNet(model)


def test_data_config_is_timms_with_the_models_own_input_size():
    source = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", **SMALL)
    config = SuperNet(source).data_config
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic"
    assert SuperNet(source, data_config=config | {"mean": (0.1, 0.2, 0.3)}).data_config["mean"] == (0.1, 0.2, 0.3)


def test_images_of_one_channel():
    net = SuperNet(timm.create_model("vit_tiny_patch16_224", **SMALL, in_chans=1))
    assert net.data_config["input_size"] == (1, 32, 32)
    assert len(net.data_config["mean"]) == len(net.data_config["std"]) == 1
    assert net.extract(spec={"blocks.0.attn": 8})(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
