"""Compensation: what cut channels did is predicted from the kept ones, as least squares would on the same images."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    cut_channels,
    make_batches,
    make_images,
    make_model,
    make_net,
    masked,
    measured_inputs,
    relative_error,
    spec_strategy,
    stock_copy,
)
from hypothesis import given
from hypothesis import strategies as st

from stratavit import SuperNet, evaluate
from stratavit.elastic.compensation import (
    LARGEST_RATIO,
    PackedMoments,
    attempt,
    cholesky,
    compensate,
    factorise,
    project,
)

IMAGES = make_images(2, seed=9)
CALIBRATION = torch.cat([images for images, _ in make_batches()])


def problem(seed, n=9, outputs=5, tokens=60):
    """Correlated channels with a mean ``[tokens, n]`` and the map that reads them ``[outputs, n]``, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(tokens, n) @ normal(n, n) + 3 * normal(n), normal(outputs, n)


def moments_of(x, weight, ridge=1e-3):
    """Mean, covariance and moments of channels."""
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    return mean, covariance, factorise(covariance, energy(weight, covariance), ridge)


def energy(weight, covariance):
    return float((weight @ covariance @ weight.T).trace())


def cut(weight, mean, moments, keep, gain):
    """`compensate` as it is called: maps and means in float32. Map and bias in float64."""
    kept, bias = compensate(weight.float(), mean.float(), moments, keep, gain)
    assert kept.shape == (len(weight), keep)
    assert bias.shape == (len(weight),)
    return kept.double(), bias.double()


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
@given(seed=st.integers(0, 999), n=st.integers(1, 12), outputs=st.integers(1, 7))
def test_every_cut_equals_the_dense_computation(gain, seed, n, outputs):
    x, weight = problem(seed, n, outputs)
    mean, covariance, moments = moments_of(x, weight)
    regularised = covariance + 1e-3 * covariance.trace() / n * torch.eye(n)
    for keep in range(1, n + 1):
        slope = covariance[keep:, :keep] @ torch.linalg.inv(regularised[:keep, :keep])
        expected = weight[:, :keep] + weight[:, keep:] @ slope
        left = energy(expected, covariance[:keep, :keep])
        expected = expected * min(max(1.0, energy(weight, covariance) / left), LARGEST_RATIO) ** (gain / 2)
        kept, bias = cut(weight, mean, moments, keep, gain)
        assert relative_error(kept, expected) <= 1e-3
        torch.testing.assert_close(bias, weight @ mean - kept @ mean[:keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [3, 511, 512, 515, 600])
def test_zeros_of_the_factor_are_left_out_of_the_product_only(keep):
    weight, factor = torch.randn(4, 600), torch.randn(600, 600).tril()
    found = project(weight, factor, keep)
    assert found.shape[1] >= keep
    torch.testing.assert_close(found, weight @ factor[:, : found.shape[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(3, 600), (191, 192, 193), (100, 400, 250), (600, 1)])
def test_columns_of_the_product_are_the_same_whenever_they_were_computed(widths):
    weight, factor, known = torch.randn(4, 600), torch.randn(600, 600).tril(), None
    for keep in widths:
        known = project(weight, factor, keep, known)
        fresh = project(weight, factor, keep)
        assert torch.equal(known[:, : fresh.shape[1]], fresh)


def test_widths_that_share_a_product_equal_those_that_do_not():
    module = make_net("plain").elastic["blocks.0.mlp"]
    widths = [30, module.full_width, 8, 30]
    with torch.no_grad():
        for width, pair in zip(widths, module.outs_at(widths), strict=True):
            for found, expected in zip(pair, module.weights_at(width)[2:], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def squared_error(x, weight, kept, bias):
    return float((x[:, : kept.shape[1]] @ kept.T + bias - x @ weight.T).square().sum())


@given(st.integers(0, 999), st.integers(1, 8))
def test_without_gain_it_is_the_least_squares_optimum(seed, keep):
    x, weight = problem(seed)
    mean, _, moments = moments_of(x, weight, ridge=1e-9)
    kept, bias = cut(weight, mean, moments, keep, 0.0)
    found = squared_error(x, weight, kept, bias)
    design = torch.cat([x[:, :keep], torch.ones(len(x), 1)], dim=1).double()
    best = torch.linalg.lstsq(design, x @ weight.T).solution
    total = float((x @ weight.T).square().sum())
    assert abs(found - squared_error(x, weight, best[:-1].T, best[-1])) <= 1e-6 * total
    mean_only = squared_error(x, weight, weight[:, :keep], weight[:, keep:] @ mean[keep:])
    assert found <= mean_only + 1e-6 * total


DEGENERATE = {
    "all constant": lambda x: torch.ones_like(x) * 4,
    "one constant": lambda x: torch.cat([torch.full_like(x[:, :1], 3), x[:, 1:]], dim=1),
    "duplicates": lambda x: x[:, [0, 0, 1, 2, 2, 2, 3, 1, 4]],
    "tiny": lambda x: x * 1e-18,
    "huge": lambda x: x * 1e15,
    "fewer tokens than channels": lambda x: x[:3],
}


@pytest.mark.parametrize("gain", [0.0, 0.5])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_channels_give_finite_numbers(case, gain):
    x, weight = problem(3)
    x = DEGENERATE[case](x)
    mean, _, moments = moments_of(x, weight)
    for keep in range(1, 10):
        kept, bias = cut(weight, mean, moments, keep, gain)
        assert kept.isfinite().all()
        assert bias.isfinite().all()
        assert gain or float(kept.abs().max()) <= 10 * float(weight.abs().max())
        rounding = 1e-5 * float((kept.abs() @ mean[:keep].abs() + weight.abs() @ mean.abs()).max())
        assert float((kept @ mean[:keep] + bias - weight @ mean).abs().max()) <= rounding
        zeros = weight * 0
        assert not any(tensor.any() for tensor in cut(zeros, mean, moments_of(x, zeros)[2], keep, gain))


@cache
def regressed(family):
    """A network that regresses without gain, with the moments of all tokens alike: the stock model can be hooked so."""
    net = copy.deepcopy(make_net(family, "mean"))
    net.compensation = "full"
    for module in net.elastic.values():
        module.gain = 0.0
    return net


@cache
def stock_inputs(family):
    stock = stock_copy(make_model(family), regressed(family))
    return stock, measured_inputs(stock, CALIBRATION)


def hooked(family, spec):
    """The stock model with the network's weights, cut channels replaced by their regression."""
    stock, inputs = stock_inputs(family)
    return masked(stock, spec, {name: tokens.mean(dim=0) for name, tokens in inputs.items()}, inputs)


@given(data=st.data())
def test_elastic_equals_the_stock_model_with_channels_predicted(family, data):
    spec = data.draw(spec_strategy(family))
    with torch.no_grad():
        assert relative_error(regressed(family)(IMAGES, spec), hooked(family, spec)(IMAGES)) <= 1e-4


@given(data=st.data())
def test_gradients_equal_the_stock_models_with_channels_predicted(family, data):
    """Of cut columns too; apart from how columns act on the mean of their channels, of which a part is held."""
    spec = data.draw(spec_strategy(family))
    net, stock = copy.deepcopy(regressed(family)), hooked(family, spec)
    for model, arguments in ((net, (IMAGES, spec)), (stock, (IMAGES,))):
        model(*arguments).square().sum().backward()
    expected = dict(stock.named_parameters())
    means = {name: tokens.mean(dim=0) for name, tokens in stock_inputs(family)[1].items()}
    for name, parameter in net.model.named_parameters():
        zeros = torch.zeros_like(parameter)
        found, wanted = (zeros if p.grad is None else p.grad for p in (parameter, expected[name]))
        site = name.replace(".proj.weight", "").replace(".fc2.weight", "")
        if site in means:
            width = spec.get(site, net.resolve(None)[site])
            if width == 0:
                assert not found.any()
                continue
            gone = cut_channels(net.elastic[site].heads, net.elastic[site].full_width, width)
            for part in (gone, ~gone):
                direction = F.normalize(means[site] * part, dim=0).to(found)
                found, wanted = (g - torch.outer(g @ direction, direction) for g in (found, wanted))
        scale = max(float(wanted.abs().max()), 1e-2)
        assert float((found - wanted).abs().max()) <= 1e-3 * scale, name


def test_gradients_reach_the_columns_that_are_cut():
    net = copy.deepcopy(make_net("plain"))
    net(IMAGES, {"blocks.0.attn": 5, "blocks.0.mlp": 40}).square().sum().backward()
    assert net.elastic["blocks.0.attn"].proj.weight.grad.abs().amin() > 0
    assert net.elastic["blocks.0.mlp"].fc2.weight.grad.abs().amin() > 0
    assert not net.elastic["blocks.0.mlp"].fc1.weight.grad[40:].any()


def test_a_map_without_bias_gains_one():
    net = make_net("no_bias")
    for module in net.elastic.values():
        assert module.weights_at(module.full_width).out_bias is None
        assert module.weights_at(3).out_bias.shape == (32,)
    small = net.extract(spec={"blocks.0.attn": 3, "blocks.1.mlp": 3})
    assert small.blocks[0].attn.proj.bias is not None
    assert small.blocks[1].mlp.fc2.bias is not None
    assert small.blocks[0].mlp.fc2.bias is None


def test_without_moments_only_the_mean_is_kept(source, batches):
    net = SuperNet(source).contract(batches, method="paper")
    spec = {site.name: site.width // 2 for site in net.sites}
    answers = []
    for compensation in ("full", "mean"):
        net.compensation = compensation
        with torch.no_grad():
            answers.append(net(IMAGES, spec))
    assert torch.equal(*answers)


def counted(net, monkeypatch):
    """Names of sites, each time that their compensated weights are computed."""
    made = []
    for name, module in net.elastic.items():
        whole = module.compensated_outs
        monkeypatch.setattr(module, "compensated_outs", lambda *args, n=name, f=whole: made.append(n) or f(*args))
    return made


def test_evaluation_computes_weights_once_and_a_call_every_time(monkeypatch):
    net, spec = copy.deepcopy(make_net("plain")), {"blocks.0.attn": 8, "blocks.1.mlp": 30}
    made = counted(net, monkeypatch)
    loader = [(IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64))] * 3
    evaluate(net, loader, spec)
    assert sorted(made) == sorted(spec)
    evaluate(net, loader, spec)
    assert sorted(made) == sorted([*spec] * 2)  # nothing outlives it
    with torch.no_grad():
        net(IMAGES, spec)
    assert sorted(made) == sorted([*spec] * 3)


def test_fixed_weights_equal_the_others_and_let_gradients_reach_images():
    net, spec = copy.deepcopy(make_net("plain")).requires_grad_(False), {"blocks.0.attn": 8, "blocks.1.mlp": 30}
    with torch.inference_mode():
        expected = net(IMAGES, spec).clone()
    images = IMAGES.clone().requires_grad_(True)
    with net.at(spec, fixed=True) as model:
        answer = model(images)
    assert torch.equal(answer.detach(), expected)
    answer.sum().backward()
    assert images.grad.any()


def test_a_network_that_was_made_in_inference_mode_runs():
    """Its tensors carry no version."""
    spec = {"blocks.0.attn": 8, "blocks.1.mlp": 30}
    with torch.inference_mode():
        net = copy.deepcopy(make_net("plain"))
        assert torch.equal(net(IMAGES, spec), make_net("plain")(IMAGES, spec))
        assert torch.equal(net.extract(spec=spec)(IMAGES), make_net("plain").extract(spec=spec)(IMAGES))


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("plain", torch.bfloat16, 0.1), ("no_bias", torch.float16, 0.01)]
)
def test_half_precision_weights_are_the_float32_result_rounded_once(name, dtype, tolerance):
    half = copy.deepcopy(make_net(name)).to(dtype)
    wide = copy.deepcopy(half).float()
    for site, module in half.elastic.items():
        for width in (1, module.full_width // 2, module.full_width - 1):
            with torch.no_grad():
                for found, expected in zip(module.weights_at(width), wide.elastic[site].weights_at(width), strict=True):
                    assert (found is None) == (expected is None)
                    if found is not None and expected is not None:
                        assert found.dtype == dtype
                        torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    spec = {site.name: site.width // 2 for site in half.sites}
    with torch.no_grad():
        assert relative_error(half(IMAGES.to(dtype), spec).float(), wide(IMAGES, spec)) <= tolerance


def test_a_module_whose_channels_hardly_vary_is_cut_saved_and_loaded(tmp_path):
    """The energy of such channels can round to below 0."""
    model = make_model("plain")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[0].attn.qkv.weight[64:] = 0
    net = SuperNet(model).contract(make_batches())
    for name in ("blocks.0.mlp", "blocks.0.attn"):
        module = net.elastic[name]
        assert module.moments.energy >= 0
        for width in range(1, module.full_width):
            assert all(t.dtype == torch.float32 and t.isfinite().all() for t in module.compensated_outs([width])[0])
    net.save(tmp_path / "run")
    assert SuperNet.load(tmp_path / "run").elastic["blocks.0.mlp"].moments.energy >= 0


def test_a_covariance_that_rounding_left_indefinite_is_regularised_until_it_can_be_factored():
    covariance = torch.diag(torch.tensor([1.0, 1e-3, -1e-2, 0.5], dtype=torch.float64))
    before = covariance.clone()
    factor, added = cholesky(covariance)
    assert torch.equal(covariance, before)
    assert added > 1e-2
    torch.testing.assert_close(factor @ factor.T, covariance + added * torch.eye(4, dtype=torch.float64))
    assert cholesky(covariance.abs())[1] == pytest.approx(1e-3 * float(covariance.abs().trace()) / 4)


def test_what_float32_cannot_factor_is_factored_in_float64_with_the_same_ridge():
    """Of rank 5, with whole numbers, so that all entries are exact: in float32 the last pivots are rounding alone."""
    x = torch.randint(-8, 9, (5, 200), generator=torch.Generator().manual_seed(0)).float()
    covariance, added = x.T @ x, 2.0**-14
    assert attempt(covariance, torch.tensor(added)).failed
    factor, found = cholesky(covariance, added / float(covariance.diagonal().mean()))
    assert (factor.dtype, found) == (torch.float64, pytest.approx(added))
    exact = covariance.double()
    exact.diagonal().add_(added)
    torch.testing.assert_close(factor @ factor.T, exact, rtol=0, atol=1e-9)
    assert cholesky(covariance)[0].dtype == torch.float32


@pytest.mark.parametrize("n", [1, 7, 8, 100])
def test_packed_moments_are_the_same(n):
    x, weight = problem(1, n)
    moments = moments_of(x, weight)[2]
    packed = moments.packed()
    assert packed.nbytes == 4 * PackedMoments.size(n) <= moments.nbytes * (0.5625 + 4 / n)
    found = packed.to(moments.factor.device)
    assert torch.equal(found.factor, moments.factor)
    assert (found.ridge, found.energy) == (moments.ridge, moments.energy)
