"""Contraction sorts what is inside the modules and leaves the model's function alone."""

import copy
from functools import cache

import pytest
import torch
from helpers import (
    make_batches,
    make_images,
    make_model,
    make_net,
    measured_means,
    out_layers,
    relative_error,
    stock_copy,
)

from stratavit import StrataViTError, SuperNet
from stratavit.calibration import contraction
from stratavit.calibration.objectives import distance
from stratavit.calibration.statistics import collect
from stratavit.calibration.wpac import CRITERIA
from stratavit.data.image_folder import image_loader

BATCHES = make_batches(dtype=torch.float64)


@cache
def contracted(family, criterion):
    """A model, and what contraction made of it, in float64 and with all tokens alike. Not to be changed."""
    source = make_model(family, dtype=torch.float64)
    return source, SuperNet(source).contract(BATCHES, criterion=criterion, token_weight=0.0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_function_and_source_stay_and_means_are_those_of_the_contracted_model(family, criterion):
    source, net = contracted(family, criterion)
    images = make_images(4, seed=9, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(net(images), source(images)) <= 1e-11
    before = make_model(family, dtype=torch.float64).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    expected = measured_means(stock_copy(source, net), torch.cat([images for images, _ in BATCHES]))
    for name, module in net.elastic.items():
        torch.testing.assert_close(module.channel_mean.flatten(), expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(module.out.weight, out_layers(source)[name].weight)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("plain", torch.bfloat16, 0.1), ("layer_scale", torch.float16, 0.01)]
)
def test_half_precision_weights_are_contracted_in_float32_and_cast_back(name, dtype, tolerance):
    """Exactly the float32 result, rounded once; the function is kept to the rounding of the type."""
    source, batches, images = make_model(name, dtype=dtype), make_batches(), make_images(4, seed=9)
    half = SuperNet(source).contract(batches)
    wide = SuperNet(copy.deepcopy(source).float()).contract(batches)
    for key, tensor in half.model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wide.model.state_dict()[key].to(dtype)), key
    with torch.no_grad():
        assert relative_error(half.float()(images), source.float()(images)) <= tolerance


def test_kept_moments_are_those_of_the_contracted_model(source, batches):
    """Measured again in the new coordinates: means, covariance (coordinate-major) and output energy."""
    net = SuperNet(source).contract(batches, token_weight=0.5)
    for name, found in collect(net.model, batches, token_weight=0.5).items():
        module, heads = net.elastic[name], found.channel_mean.shape[0]
        torch.testing.assert_close(module.channel_mean.double(), found.channel_mean, rtol=1e-3, atol=1e-4)
        order = torch.arange(heads * module.full_width).view(heads, -1).T.flatten()
        covariance, factor = found.covariance[order][:, order].double(), module.moments.factor.double()
        assert factor.isfinite().all()
        ridge = module.moments.ridge * torch.eye(len(order), dtype=torch.float64)
        assert relative_error(factor @ factor.T - ridge, covariance) <= 1e-4
        assert module.moments.ridge == pytest.approx(1e-3 * float(covariance.trace()) / len(order), rel=1e-3)
        weight = module.out.weight.detach().double()[:, order]
        assert module.moments.energy == pytest.approx(float((weight @ covariance @ weight.T).trace()), rel=1e-3)


def test_layer_scale_counts_as_part_of_the_map_out():
    """A model with LayerScale and the same model with the factors multiplied into the weights are sorted alike."""
    source = make_model("layer_scale", dtype=torch.float64)
    with torch.no_grad():
        for block in source.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.copy_(torch.logspace(-2, 1, len(scale.gamma)))
    merged = copy.deepcopy(source)
    with torch.no_grad():
        for block in merged.blocks:
            for scale, layer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
                layer.weight.mul_(scale.gamma[:, None])
                layer.bias.mul_(scale.gamma)
                scale.gamma.fill_(1)
    found, expected = (SuperNet(model).contract(BATCHES, token_weight=0.0) for model in (source, merged))
    for name, module in found.elastic.items():
        for one, other in zip(module.in_weight(8), expected.elastic[name].in_weight(8), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def moments_in(module):
    return [module.moments, *(moments.to("cpu") for _, moments in module.crossed)]


@pytest.mark.parametrize("limit", [1, 30_000])
def test_sites_sorted_together_equal_those_sorted_one_by_one(family, limit, monkeypatch):
    """However many find room: one, or two of four."""
    together = SuperNet(make_model(family, dtype=torch.float64)).contract(BATCHES)
    monkeypatch.setattr(contraction, "HOST_BYTES", limit)
    apart = SuperNet(make_model(family, dtype=torch.float64)).contract(BATCHES)
    for name, module in together.elastic.items():
        other = apart.elastic[name]
        assert len(module.crossed) == 2
        for one, two in zip(moments_in(module), moments_in(other), strict=True):
            torch.testing.assert_close(one.factor, two.factor, rtol=1e-5, atol=1e-7)
    for one, two in zip(together.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_moments_are_dropped_by_a_criterion_that_measures_none(batches):
    net = SuperNet(make_model("plain")).contract(batches)
    assert all(module.moments is not None for module in net.elastic.values())
    net.contract(batches, criterion="taylor")
    assert all(module.moments is None for module in net.elastic.values())


def assert_descending(values):
    assert (values[..., :-1] >= values[..., 1:] - 1e-4 * values.abs().max()).all()


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_rankings_come_out_sorted(family, criterion):
    """A permutation carries each channel's importance along, so measuring again finds it sorted."""
    for name, result in collect(contracted(family, criterion)[1].model, BATCHES).items():
        scores = getattr(result, criterion)
        for sorted_scores in (scores[2], scores[0] + scores[1]) if name.endswith("attn") else (scores,):
            assert_descending(sorted_scores)


def test_magnitude_comes_out_sorted(family):
    for module in contracted(family, "magnitude")[1].elastic.values():
        columns = module.out.weight.detach().square().sum(dim=0)
        if module.attention:
            rows = module.qkv.weight.detach().square().sum(dim=1).view(3, module.heads, -1)
            assert_descending((rows[2] + columns.view(module.heads, -1)).sqrt())
            assert_descending(rows[0].sqrt() + rows[1].sqrt())
        else:
            assert_descending((module.fc1.weight.detach().square().sum(dim=1) + columns).sqrt())


def assert_principal(scatter):
    """A diagonal of falling variances."""
    variances = scatter.diagonal(dim1=-2, dim2=-1)
    assert (scatter - torch.diag_embed(variances)).abs().max() <= 1e-4 * variances.max()
    assert_descending(variances)


@pytest.mark.parametrize(("criterion", "scatter"), [("wpac", "weighted"), ("pca", "plain")])
def test_rows_are_the_axes_of_the_scatter(family, criterion, scatter):
    """Recovers U^T from W_v' = U^T W_v and checks that it diagonalises the scatter of the old coordinates."""
    source, net = contracted(family, criterion)
    for name, result in collect(SuperNet(source).model, BATCHES, scatter=scatter).items():
        if name.endswith("attn"):
            shape = (3, *result.scatter.shape[1:3], -1)
            new, old = (m.state_dict()[f"{name}.qkv.weight"].view(shape) for m in (net.model, source))
            turn = new @ torch.linalg.pinv(old)  # [3, H, d, d]
            assert torch.allclose(turn[0], turn[1], atol=1e-8)
            q, k, v = result.scatter
            assert_principal(turn[0] @ (q + k) @ turn[0].transpose(-1, -2))
            assert_principal(turn[2] @ v @ turn[2].transpose(-1, -2))


@pytest.mark.parametrize("criterion", ["output", "wpac", "random"])
def test_mlp_hidden_units_are_only_permuted(family, criterion):
    def units(mlp):
        bias = [] if mlp.fc1.bias is None else [mlp.fc1.bias[:, None]]
        return sorted(torch.cat([mlp.fc1.weight, *bias, mlp.fc2.weight.T], dim=1).tolist())

    source, net = contracted(family, criterion)
    for block, ours in zip(source.blocks, net.model.blocks, strict=True):
        assert units(ours.mlp) == units(block.mlp)


@pytest.mark.parametrize("criterion", ["random", "wpac", "output"])
def test_result_depends_on_the_seed_only_for_random(batches, criterion):
    first, again, other = (
        SuperNet(make_model("plain")).contract(batches, criterion=criterion, seed=seed).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items()) == (criterion != "random")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"criterion": "best"}, "criterion"),
        ({"method": "fast"}, "method"),
        ({"token_weight": 1.5}, "token_weight"),
        ({"loader": [], "method": "paper"}, "no images"),
    ],
)
def test_bad_input_changes_nothing(options, named, batches):
    net = copy.deepcopy(make_net("plain", stratified=True))
    before, provenance = copy.deepcopy(net.model.state_dict()), copy.deepcopy(net.provenance)
    with pytest.raises(StrataViTError, match=named):
        net.contract(**{"loader": batches} | options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.model.state_dict().items())
    assert (net.provenance, net.method) == (provenance, "default")
    assert net.strata is not None


@pytest.mark.real_weights
def test_real_deit_tiny_keeps_its_function_and_is_closest_with_full_compensation(real_data, deit_tiny):
    """Half of every width: the distance to the dense model's outputs falls from none over mean to full."""
    net = SuperNet(deit_tiny)
    options = {"num_classes": 1000, "class_map": real_data / "imagenet" / "class_map.txt", "batch_size": 16}
    net.contract(image_loader(real_data / "imagenet", net.data_config, "train", limit=16, **options))
    loader = image_loader(real_data / "imagenet", net.data_config, "val", limit=16, **options)
    images, distances = torch.cat([images for images, _ in loader]), []
    with torch.no_grad():
        dense = deit_tiny(images)
        assert (net(images) - dense).abs().max() <= 1e-4
        assert (stock_copy(deit_tiny, net)(images) - dense).abs().max() <= 1e-4
        for compensation in ("full", "mean", "none"):
            net.compensation = compensation
            small = net(images, {site.name: site.width // 2 for site in net.sites})
            distances.append(float(distance(small, dense, 1000)))
    assert distances == sorted(distances)
    assert distances[0] < 0.9 * distances[1]
    for name, layer in out_layers(deit_tiny).items():
        assert not torch.equal(layer.weight, net.elastic[name].out.weight)
