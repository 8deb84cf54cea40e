"""Moments that are streamed equal moments computed in one step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratavit.calibration.accumulators import RunningCovariance, RunningScatter, Sums, gram

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SHARES = pytest.mark.parametrize("share", [0.0, 0.5, 1.0])


def drawn(seed, *shape):
    """Features ``[*shape, 4]`` with a mean, and weights ``[*shape]``, some of them near 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.rand(*shape, generator=generator, dtype=torch.float64) ** 3


def far_away(dtype, *shape):
    """Features ``[*shape, 3]`` whose mean is 1e4 times the spread: products of float32 would lose all digits."""
    return (torch.randn(*shape, 3, dtype=torch.float64) + torch.tensor([1e4, -3e4, 2e4])).to(dtype)


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


def mixture(x, weight, share):
    """Mean ``[n]`` and covariance ``[n, n]`` under weights ``1 - share + share * w / mean(w)``, float64 numpy."""
    x, weight = x.double().numpy(), weight.double().numpy()
    mixed = 1 - share + share * weight / weight.mean()
    mean = np.average(x, axis=0, weights=mixed)
    return mean, np.einsum("t,ti,tj->ij", mixed, x - mean, x - mean) / len(x)


def streamed_covariance(x, weight, share, sizes):
    running = RunningCovariance(share)
    for part, part_weight in zip(x.split(sizes), weight.split(sizes), strict=True):
        running.update(part, part_weight if share else None)
    return running.result()


def assert_mixture(x, weight, share, sizes, expected_weight=None, tolerance=1e-10):
    expected = mixture(x, weight if expected_weight is None else expected_weight, share)
    for found, value in zip(streamed_covariance(x, weight, share, sizes), expected, strict=True):
        assert_close(found, value, tolerance)


@SHARES
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_covariances_do_not_depend_on_the_split_or_the_scale_of_the_weights(share, sizes, seed):
    x, weight = drawn(seed, sum(sizes))
    assert_mixture(x, weight, share, sizes)
    assert_mixture(x, weight * 1e-9, share, sizes, weight)


@SHARES
@pytest.mark.parametrize("sizes", [[20], [5, 15], [1] * 20])
def test_weights_of_zero_count_as_plain_ones(share, sizes):
    x, _ = drawn(0, 20)
    assert_mixture(x, torch.zeros(20), share, sizes, torch.ones(20))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_batches_that_weigh_nothing_leave_the_weighted_part_alone(share):
    x, weight = drawn(1, 20)
    weight[:8] = weight[12:16] = 0
    assert_mixture(x, weight, share, [8, 4, 4, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_precision(dtype):
    x, weight = far_away(dtype, 2, 400), torch.rand(2, 400, dtype=dtype)
    assert_close(streamed_scatter(x, weight, [150, 1, 249]), scatter_of(x, weight), 1e-5)
    for share in (0.0, 0.5, 1.0):
        mean, covariance = streamed_covariance(x[0], weight[0], share, [150, 1, 249])
        expected = mixture(x[0], weight[0], share)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-8)
        assert_close(covariance, expected[1], 1e-5)


def test_inputs_are_left_as_they_were():
    x, weight = torch.randn(50, 300, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    kept = x.clone(), weight.clone()
    streamed_covariance(x, weight, 0.5, [20, 30])
    streamed_scatter(x[None], weight[None], [20, 30])
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 301, 512])
def test_gram_equals_the_plain_product(n, blocks):
    """Below and above the size from which blocks are mirrored, whether the blocks divide it or not."""
    x = torch.randn(9, n, dtype=torch.float64)
    torch.testing.assert_close(gram(x, blocks), x.T @ x, rtol=1e-12, atol=1e-12)
