"""Attention that loses whole heads: the function is kept, small models are timm's own with fewer heads."""

import copy
import itertools

import architectures
import pytest
import torch
from helpers import PLAN, change_weights, make_batches, make_images, make_model, make_net, relative_error
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

import stratavit
from stratavit import StrataViTError, SuperNet, UnsupportedModelError
from stratavit.artifacts.sub_network import site_widths
from stratavit.calibration.elimination import elimination_order
from stratavit.calibration.head_order import head_order
from stratavit.dropout_list.sensitivity import measure_importance
from stratavit.models.cost import linear_macs

SPECS = [
    {"blocks.0.attn": 3},
    {"blocks.0.attn": 1, "blocks.1.attn": 2, "blocks.1.mlp": 9},
    {"blocks.0.attn": 0, "blocks.1.attn": 1},
]


def source():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def net():
    return SuperNet(source(), whole_heads=True).contract(make_batches()).stratify(make_batches(), plan=PLAN).eval()


def test_sorting_heads_keeps_the_function(net):
    images = make_images(4)
    with torch.no_grad():
        assert relative_error(net(images), source()(images)) < 1e-5
    before, after = (one.blocks[0].attn.qkv.weight for one in (source(), net.model))
    assert sorted(before.sum(dim=1).tolist()) == pytest.approx(sorted(after.sum(dim=1).tolist()))


@pytest.mark.parametrize("compensation", ["full", "mean", "none"])
@pytest.mark.parametrize("spec", SPECS)
def test_small_models_are_timms_with_fewer_heads(net, spec, compensation, tmp_path):
    net, images = copy.deepcopy(net), make_images(4)
    net.compensation = compensation
    small = net.extract(spec=spec, verbose=False)
    for block, (name, heads) in zip(small.blocks, sorted(net.resolve(spec).items())[::2], strict=True):
        assert name.endswith("attn")
        assert heads == 0 or (type(block.attn), block.attn.num_heads, block.attn.head_dim) == (Attention, heads, 8)
    with torch.no_grad():
        assert relative_error(small(images), net(images, spec)) < 1e-5
    for attention in (False, True):
        assert linear_macs(small, net.data_config["input_size"], attention=attention) == net.macs(spec, attention)
    assert sum(p.numel() for p in small.parameters()) == net.params(spec)
    stratavit.save(small, tmp_path / "small")
    again = stratavit.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(images), small(images))
    assert again.provenance["spec"] == dict(net.resolve(spec))


def test_qk_norm_allows_whole_heads(tmp_path):
    """All heads share one norm of q and one of k, which coordinates do not allow to be cut."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, num_classes=7, embed_dim=32, depth=2, num_heads=4, qk_norm=True
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model, images = model.eval(), make_images(4)
    net = SuperNet(model, whole_heads=True).contract(make_batches()).stratify(make_batches(), plan=PLAN).eval()
    with torch.no_grad():
        assert relative_error(net(images), model(images)) < 1e-5
    for spec in SPECS:
        small = net.extract(spec=spec, verbose=False)
        assert linear_macs(small, net.data_config["input_size"]) == net.macs(spec)
        assert sum(p.numel() for p in small.parameters()) == net.params(spec)
        stratavit.save(small, tmp_path / "small", overwrite=True)
        with torch.no_grad():
            assert relative_error(small(images), net(images, spec)) < 1e-5
            assert torch.equal(stratavit.load(tmp_path / "small")(images), small(images))
    net.save(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(SuperNet.load(tmp_path / "net")(images, SPECS[1]), net(images, SPECS[1]))


def test_compensation_is_the_regression_on_the_heads_that_stay(net):
    """Less is lost than without, on the images of the calibration."""
    images, spec = torch.cat([images for images, _ in make_batches()]), {"blocks.0.attn": 2, "blocks.1.attn": 2}
    lost = {}
    for compensation in ("full", "none"):
        own = copy.deepcopy(net)
        own.compensation = compensation
        with torch.no_grad():
            lost[compensation] = relative_error(own(images, spec), own(images))
    assert lost["full"] < lost["none"]


def test_files_of_the_super_network(net, tmp_path):
    net.save(tmp_path / "net")
    again, images = SuperNet.load(tmp_path / "net"), make_images(2)
    assert again.strata.entries == net.strata.entries
    assert [site.whole_heads for site in again.sites] == [True, False] * 2
    with torch.no_grad():
        for spec in SPECS:
            assert torch.equal(again(images, spec), net(images, spec))


def test_every_head_is_a_unit_of_the_list(net):
    left = [entry.width for entry in net.strata.entries if entry.site == "blocks.0.attn"]
    assert left == [3, 2, 1, 0]
    for units in ("gpu", "default"):
        other = copy.deepcopy(net)
        other.set_units(units=units)
        assert other.sites[0].steps == (0, 1, 2, 3, 4)
    budget = net.budget(macs=0.6)
    assert budget.got <= 0.6 * net.macs()


def test_tokens_and_training_go_with_it():
    net = SuperNet(source(), whole_heads=True).contract(make_batches())
    net.stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))
    spec, images = net.spec(macs=0.5), make_images(4)
    net(images, {**spec, "blocks.0.attn": 2}).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.model.blocks[0].attn.parameters())
    change_weights(net)
    with torch.no_grad():
        assert relative_error(net.extract(spec=spec, verbose=False)(images), net(images, spec)) < 1e-5


def test_a_small_model_is_cut_by_coordinates_again(net, tmp_path):
    """It says that its heads were whole; the new super-network, and its files, that they are not."""
    again = SuperNet(net.extract(spec=SPECS[1], verbose=False)).contract(make_batches()).eval()
    assert [site.width for site in again.sites if site.kind == "attention"] == [8, 8]
    assert "whole_heads" not in again.description
    again.save(tmp_path / "again")
    spec, images = {"blocks.1.attn": 5}, make_images(2)
    with torch.no_grad():
        assert torch.equal(SuperNet.load(tmp_path / "again")(images, spec), again(images, spec))
    small = again.extract(spec=spec, verbose=False)
    assert site_widths(small)["blocks.1.attn"] == 5


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"])
def test_heads_that_do_not_divide_the_width(name):
    """timm builds models of equal heads that divide it, and attention pooling with heads of its own."""
    images, model = make_images(2), architectures.make(name, num_heads=4)
    net = SuperNet(model, whole_heads=True).contract([images for images, _ in make_batches()]).eval()
    for spec in ({"blocks.0.attn": 3}, {"blocks.0.attn": 3, "blocks.1.attn": 3}, {"blocks.0.attn": 2}):
        with torch.no_grad():
            assert relative_error(net.extract(spec=spec, verbose=False)(images), net(images, spec)) < 1e-5


def test_importance_of_heads_is_that_of_their_channels(net):
    found, statistics, _ = measure_importance(net.model, net.sites, make_batches(), "auto", "cost")
    assert statistics["blocks.0.attn"].taylor.shape == (1, 8, 4)
    assert [len(found[name]) for name in ("blocks.0.attn", "blocks.1.attn")] == [4, 4]


# ---- the order ----------------------------------------------------------------------------------


def problem(width, heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(200, width * heads, generator=generator, dtype=torch.float64)
    tokens = tokens @ torch.randn(width * heads, width * heads, generator=generator, dtype=torch.float64)
    return torch.randn(6, width, heads, generator=generator, dtype=torch.float64), tokens.T @ tokens / 200


def lost(weight, covariance, kept):
    """Energy of the output that the best map from the kept channels loses."""
    flat = weight.flatten(1)
    every = covariance[:, kept] @ torch.linalg.solve(covariance[kept][:, kept], covariance[kept])
    return float((flat @ (covariance - every) @ flat.T).trace())


@pytest.mark.parametrize("seed", range(3))
def test_each_head_that_leaves_is_the_one_that_costs_least(seed):
    weight, covariance = problem(3, 4, seed)
    channels = torch.arange(12).view(3, 4)
    order = head_order(weight, covariance).tolist()
    for left in range(2, 5):
        costs = {
            gone: lost(weight, covariance, channels[:, [h for h in order[:left] if h != gone]].flatten())
            for gone in order[:left]
        }
        assert min(costs, key=costs.get) == order[left - 1]


def test_heads_of_one_channel_are_channels():
    weight, covariance = problem(1, 9)
    expected = elimination_order(weight.flatten(1)[None], [covariance], block=1)[0]
    assert torch.equal(head_order(weight, covariance), expected)


def test_the_best_pairs_are_nearly_found():
    weight, covariance = problem(2, 4)
    channels = torch.arange(8).view(2, 4)
    costs = [
        lost(weight, covariance, channels[:, list(pair)].flatten()) for pair in itertools.combinations(range(4), 2)
    ]
    kept = head_order(weight, covariance)[:2]
    assert lost(weight, covariance, channels[:, kept].flatten()) <= sorted(costs)[2]


# ---- mistakes -----------------------------------------------------------------------------------


def test_what_has_no_whole_heads_is_refused():
    with pytest.raises(StrataViTError, match="method"):
        SuperNet(make_model("plain"), whole_heads=True).contract(make_batches(), method="paper")
    with pytest.raises(UnsupportedModelError, match="whole_heads"):
        SuperNet(architectures.make("swin_tiny_patch4_window7_224"), whole_heads=True)
    with pytest.raises(UnsupportedModelError, match="whole_heads"):
        SuperNet(architectures.make(architectures.TRANSFORMERS[0]), whole_heads=True)
    assert not make_net("plain").sites[0].whole_heads
