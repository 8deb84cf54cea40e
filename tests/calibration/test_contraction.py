"""Contraction sorts what is inside the modules and leaves the model's function alone."""

import copy

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
from stratavit.calibration.statistics import collect
from stratavit.calibration.wpac import CRITERIA
from stratavit.data.image_folder import image_loader
from stratavit.elastic.attention import ElasticAttention
from stratavit.elastic.base import AttentionTransform
from stratavit.elastic.mlp import ElasticMlp


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_function_is_preserved_and_the_source_not_touched(source, batches, images, criterion):
    before = copy.deepcopy(source.state_dict())
    net = SuperNet(source).contract(batches, criterion=criterion)
    with torch.no_grad():
        assert (net(images) - source(images)).abs().max() <= 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in net.model.state_dict().items())


def test_the_function_is_preserved_tightly_in_float64(family):
    source, images = make_model(family, dtype=torch.float64), make_images(4, seed=9, dtype=torch.float64)
    net = SuperNet(source).contract(make_batches(dtype=torch.float64))
    with torch.no_grad():
        assert relative_error(net(images), source(images)) <= 1e-11


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_weights_are_contracted_in_float32_and_cast_back(family, dtype, tolerance):
    """Exactly the float32 result, rounded once; the function is kept to the rounding of the type."""
    source, batches, images = make_model(family, dtype=dtype), make_batches(), make_images(4, seed=9)
    half = SuperNet(source).contract(batches)
    wide = SuperNet(copy.deepcopy(source).float()).contract(batches)
    for name, tensor in half.model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, wide.model.state_dict()[name].to(dtype)), name
    with torch.no_grad():
        assert relative_error(half.float()(images), source.float()(images)) <= tolerance


@pytest.mark.parametrize("criterion", CRITERIA)
def test_kept_means_are_those_of_the_contracted_model(source, batches, criterion):
    net = SuperNet(source).contract(batches, criterion=criterion, token_weight=0.0)
    expected = measured_means(stock_copy(source, net), torch.cat([images for images, _ in batches]))
    for name, module in net.elastic.items():
        assert module.channel_mean.dtype == torch.float32
        torch.testing.assert_close(module.channel_mean.flatten().double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token_weight", [0.0, 0.5, 1.0])
def test_kept_moments_are_those_of_the_contracted_model(source, batches, token_weight):
    """Measured again in the new coordinates: means, covariance (coordinate-major) and output energy."""
    net = SuperNet(source).contract(batches, token_weight=token_weight)
    for name, found in collect(net.model, batches, token_weight=token_weight).items():
        module, heads = net.elastic[name], found.channel_mean.shape[0]
        torch.testing.assert_close(module.channel_mean.double(), found.channel_mean, rtol=1e-3, atol=1e-4)
        order = torch.arange(heads * module.full_width).view(heads, -1).T.flatten()
        covariance, factor = found.covariance[order][:, order], module.moments.factor.double()
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
    batches = make_batches(dtype=torch.float64)
    found, expected = (SuperNet(model).contract(batches, token_weight=0.0) for model in (source, merged))
    for name, module in found.elastic.items():
        for one, other in zip(module.in_weight(8), expected.elastic[name].in_weight(8), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_moments_are_dropped_by_a_criterion_that_measures_none(batches):
    net = SuperNet(make_model("plain")).contract(batches)
    assert all(module.moments is not None for module in net.elastic.values())
    net.contract(batches, criterion="taylor")
    assert all(module.moments is None for module in net.elastic.values())


def assert_descending(values):
    assert (values[..., :-1] >= values[..., 1:] - 1e-4 * values.abs().max()).all()


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_rankings_come_out_sorted(source, batches, criterion):
    """A permutation carries each channel's importance along, so measuring again finds it sorted."""
    net = SuperNet(source).contract(batches, criterion=criterion)
    for name, result in collect(net.model, batches).items():
        scores = getattr(result, criterion)
        if name.endswith("attn"):
            assert_descending(scores[2])
            assert_descending(scores[0] + scores[1])
        else:
            assert_descending(scores)


def test_magnitude_comes_out_sorted(source, batches):
    net = SuperNet(source).contract(batches, criterion="magnitude")
    for module in net.elastic.values():
        columns = module.out.weight.detach().square().sum(dim=0)
        if isinstance(module, ElasticMlp):
            assert_descending((module.fc1.weight.detach().square().sum(dim=1) + columns).sqrt())
        else:
            rows = module.qkv.weight.detach().square().sum(dim=1).view(3, module.heads, -1)
            assert_descending((rows[2] + columns.view(module.heads, -1)).sqrt())
            assert_descending(rows[0].sqrt() + rows[1].sqrt())


def assert_principal(scatter):
    """A diagonal of falling variances."""
    variances = scatter.diagonal(dim1=-2, dim2=-1)
    assert (scatter - torch.diag_embed(variances)).abs().max() <= 1e-4 * variances.max()
    assert_descending(variances)


def test_pca_comes_out_uncorrelated_with_falling_variance(source, batches):
    net = SuperNet(source).contract(batches, criterion="pca")
    for name, result in collect(net.model, batches, scatter="plain").items():
        if name.endswith("attn"):
            q, k, v = result.scatter
            assert_principal(q + k)
            assert_principal(v)


def test_wpac_rows_are_the_axes_of_the_weighted_scatter(source, batches):
    """Recovers U^T from W_v' = U^T W_v and checks that it diagonalises the scatter of the old coordinates."""
    net = SuperNet(source)
    before = collect(net.model, batches)
    net.contract(batches, method="paper")
    for name, result in before.items():
        if name.endswith("attn"):
            shape = (3, *result.scatter.shape[1:3], -1)
            new, old = (m.state_dict()[f"{name}.qkv.weight"].double().view(shape) for m in (net.model, source))
            turn = new @ torch.linalg.pinv(old)  # [3, H, d, d]
            assert torch.allclose(turn[0], turn[1], atol=1e-4)
            q, k, v = result.scatter
            assert_principal(turn[0] @ (q + k) @ turn[0].transpose(-1, -2))
            assert_principal(turn[2] @ v @ turn[2].transpose(-1, -2))


@pytest.mark.parametrize("method", ["default", "paper"])
def test_mlp_hidden_units_are_only_permuted(source, batches, method):
    net = SuperNet(source).contract(batches, method=method)
    for index, block in enumerate(source.blocks):
        ours = net.model.blocks[index].mlp

        def units(mlp):
            bias = [] if mlp.fc1.bias is None else [mlp.fc1.bias[:, None]]
            return torch.cat([mlp.fc1.weight, *bias, mlp.fc2.weight.T], dim=1).detach()

        assert sorted(units(ours).tolist()) == sorted(units(block.mlp).tolist())
        assert not torch.equal(units(ours), units(block.mlp))


def test_result_depends_on_the_seed_only_for_random(batches):
    def weight(criterion, seed):
        net = SuperNet(make_model("plain")).contract(batches, criterion=criterion, seed=seed)
        return net.model.blocks[0].mlp.fc1.weight

    assert torch.equal(weight("random", 1), weight("random", 1))
    assert not torch.equal(weight("random", 1), weight("random", 2))
    assert torch.equal(weight("wpac", 1), weight("wpac", 2))
    assert torch.equal(weight("output", 1), weight("output", 2))


def test_any_invertible_transform_may_be_folded():
    """`q^T k = 1` and `o v = 1` are all it takes; rotations are not needed."""
    attn = make_model("odd_widths", dtype=torch.float64).blocks[0].attn
    tokens = torch.randn(2, 5, 36, dtype=torch.float64)
    v, k = torch.randn(2, attn.num_heads, attn.head_dim, attn.head_dim, dtype=torch.float64)
    elastic = ElasticAttention(copy.deepcopy(attn))
    with torch.no_grad():
        transform = AttentionTransform(q=torch.linalg.inv(k).transpose(1, 2), k=k, v=v, o=torch.linalg.inv(v))
        elastic.fold(transform)
        torch.testing.assert_close(elastic(tokens), attn(tokens), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(elastic.qkv.weight, attn.qkv.weight)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"criterion": "best"}, "criterion"),
        ({"method": "fast"}, "method"),
        ({"method": "default", "criterion": "wpac"}, "method"),
        ({"objective": "loss"}, "objective"),
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
def test_real_deit_tiny_keeps_its_function(real_data, deit_tiny):
    net = SuperNet(deit_tiny)
    options = {"num_classes": 1000, "class_map": real_data / "imagenet" / "class_map.txt", "batch_size": 16}
    net.contract(image_loader(real_data / "imagenet", net.data_config, "train", limit=16, **options))
    images, _ = next(iter(image_loader(real_data / "imagenet", net.data_config, "val", limit=8, **options)))
    with torch.no_grad():
        expected = deit_tiny(images)
        assert (net(images) - expected).abs().max() <= 1e-4
        assert (stock_copy(deit_tiny, net)(images) - expected).abs().max() <= 1e-4
    for name, layer in out_layers(deit_tiny).items():
        assert not torch.equal(layer.weight, net.elastic[name].out.weight)
