"""Moments that are streamed equal moments computed in one step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stratavit.calibration import accumulators
from stratavit.calibration.accumulators import GramSum, RunningCovariance, RunningScatter, Sums

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def drawn(seed, *shape):
    """Features ``[*shape, 4]`` with a mean, and weights ``[*shape]``, some of them near 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.rand(*shape, generator=generator, dtype=torch.float64) ** 3


def assert_close(found, expected, tolerance):
    assert found.dtype == torch.float64
    scale = max(float(np.abs(np.asarray(expected)).max()), 1e-9)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def scatter_of(x, weight):
    """Weighted scatter around the unweighted mean, ``[G, d, d]``, in float64 numpy."""
    x, weight = x.double().numpy(), weight.double().numpy()
    centred = x - x.mean(axis=1)[:, None]
    return np.einsum("gt,gti,gtj->gij", weight, centred, centred)


def streamed_scatter(x, weight, sizes):
    running = RunningScatter()
    for part, part_weight in zip(x.split(sizes, 1), weight.split(sizes, 1), strict=True):
        running.update(part, part_weight)
    return running.scatter


def weighted(x, weight):
    """Mean ``[n]`` and covariance ``[n, n]`` of weighted tokens, float64 numpy."""
    x, weight = x.double().numpy(), weight.double().numpy()
    mean = np.average(x, axis=0, weights=weight)
    return mean, np.einsum("t,ti,tj->ij", weight / weight.sum(), x - mean, x - mean)


def streamed_covariance(x, weight, sizes):
    running = RunningCovariance()
    for part, part_weight in zip(x.split(sizes), weight.split(sizes), strict=True):
        running.update(part, part_weight)
    return running.result()


@given(sizes=SIZES, seed=st.integers(0, 99))
def test_sums_and_scatters_do_not_depend_on_the_split(sizes, seed):
    x, weight = drawn(seed, 3, sum(sizes))
    found = streamed_scatter(x, weight, sizes)
    assert_close(found, scatter_of(x, weight), 1e-11)
    assert torch.equal(found, found.transpose(1, 2))
    sums, plain = Sums(), RunningScatter()
    for part in x.split(sizes, 1):
        sums.add(part.shape[1], part.sum(dim=1), part.square().sum(dim=1))
        plain.update(part)
    assert_close(torch.stack(sums.means), torch.stack([x, x.square()]).mean(dim=2), 1e-11)
    assert_close(plain.scatter, scatter_of(x, torch.ones_like(weight)), 1e-11)


@given(sizes=SIZES, seed=st.integers(0, 99))
def test_covariances_do_not_depend_on_the_split_or_the_scale_of_the_weights(sizes, seed):
    """Batches that weigh nothing do not count; without weights all weigh the same."""
    x, weight = drawn(seed, sum(sizes))
    last = torch.arange(len(weight)) >= sizes[0]
    cases = [(weight, weight), (weight * 1e-9, weight)] + [(weight * last, weight * last)] * bool(last.sum() > 2)
    for given_weight, counted in cases:
        for one, expected in zip(streamed_covariance(x, given_weight, sizes), weighted(x, counted), strict=True):
            assert_close(one, expected, 1e-10)
    running = RunningCovariance()
    for part in x.split(sizes):
        running.update(part)
    for one, expected in zip(running.result(), weighted(x, torch.ones_like(weight)), strict=True):
        assert_close(one, expected, 1e-10)


def test_a_large_mean_costs_no_precision_and_inputs_stay_as_they_were():
    """The mean is 1e4 times the spread: products of float32 would lose all digits."""
    x, weight = torch.randn(2, 400, 3) + torch.tensor([1e4, -3e4, 2e4]), torch.rand(2, 400)
    kept = x.clone(), weight.clone()
    assert_close(streamed_scatter(x, weight, [150, 1, 249]), scatter_of(x, weight), 1e-5)
    mean, covariance = streamed_covariance(x[0], weight[0], [150, 1, 249])
    expected = weighted(x[0], weight[0])
    np.testing.assert_allclose(mean, expected[0], rtol=1e-8)
    assert covariance.dtype == torch.float32
    assert_close(covariance.double(), expected[1], 1e-5)
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


def gram_sum(x):
    return GramSum(x.shape[-1], x.new_zeros(GramSum.size(x.shape[-1])))


def mirrored(products, n):
    total = torch.zeros(n, n, dtype=torch.float64)
    products.add_to(total, torch.tensor(1.0, dtype=torch.float64))
    products.mirror(total)
    return total


@pytest.mark.parametrize("flush", [2, 99])
@pytest.mark.parametrize("n", [7, 256, 301, 1100])
def test_gram_sums_equal_the_plain_product(n, flush, monkeypatch):
    """Below and above the size from which there are blocks, whether these divide it or not, moved to float64 or not."""
    monkeypatch.setattr(accumulators, "FLUSH", flush)
    x = torch.randn(5, 9, n, dtype=torch.float64)
    products = gram_sum(x)
    for part in x:
        products.add(part)
    expected = (x.mT @ x).sum(dim=0)
    torch.testing.assert_close(mirrored(products, n), expected, rtol=1e-12, atol=1e-12)
    other = expected + 1
    torch.testing.assert_close(products.inner(other), (expected * other).sum(), rtol=1e-12, atol=1e-12)


def test_sums_of_float32_keep_their_bound_over_many_batches():
    """600 batches of 16 tokens: of (16 + 256) 2^-24 times the sum of magnitudes no entry uses a tenth."""
    x = torch.randn(600, 16, 5) + 1
    products = gram_sum(x)
    for part in x:
        products.add(part)
    exact, magnitude = (torch.einsum("bti,btj->ij", y, y) for y in (x.double(), x.double().abs()))
    error = (mirrored(products, 5) - exact).abs() / magnitude
    assert float(error.max()) <= 0.1 * (16 + accumulators.FLUSH) * 2**-24


@pytest.mark.parametrize("what", ["nan", "overflow"])
def test_what_is_not_finite_is_noticed(what):
    running, x = RunningCovariance(), torch.randn(2, 6, 4)
    running.update(x[0], torch.ones(6))
    assert running.is_finite()
    x[1, 3, 2] = torch.nan if what == "nan" else 1e30
    running.update(x[1], torch.ones(6), fold=1)
    assert not running.is_finite()


@given(sizes=SIZES, n=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_streamed_sums_are_those_of_sums_in_place(sizes, n, seed):
    """Products made apart and then added: within the bound of float32, and of the same sums in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), n, generator=generator)
    found = []
    for streamed in (False, True):
        products = GramSum(n, torch.zeros(GramSum.size(n)), streamed)
        for part in x.split(sizes):
            products.add(part)
        found.append(mirrored(products, n))
    exact, magnitude = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    for one in found:
        assert bool(((one - exact).abs() <= (max(sizes) + len(sizes)) * 2**-24 * magnitude).all())


def test_streamed_sums_are_moved_to_float64_like_others(monkeypatch):
    monkeypatch.setattr(accumulators, "FLUSH", 2)
    x = torch.randn(5, 9, 301, dtype=torch.float64)
    products = GramSum(301, x.new_zeros(GramSum.size(301)), streamed=True)
    for part in x:
        products.add(part)
    torch.testing.assert_close(mirrored(products, 301), (x.mT @ x).sum(dim=0), rtol=1e-12, atol=1e-12)
