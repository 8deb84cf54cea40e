"""Streaming moments equal moments computed at one go."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratavit.calibration.moments import RunningCovariance, RunningMean, RunningScatter, gram


def one_shot(x, weight):
    """Unweighted mean ``[G, d]`` and weighted scatter around it ``[G, d, d]``, in float64 numpy."""
    x, weight = x.double().numpy(), weight.double().numpy()
    mean = x.mean(axis=1)
    centred = x - mean[:, None]
    return mean, np.einsum("gt,gti,gtj->gij", weight, centred, centred)


def stream(x, weight, sizes):
    scatter, mean = RunningScatter(), RunningMean()
    for part, part_weight in zip(x.split(sizes, 1), weight.split(sizes, 1), strict=True):
        scatter.update(part, part_weight)
        mean.update(part.sum(dim=1), part.shape[1])
    return scatter, mean


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_split_gives_the_one_shot_result(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, sum(sizes), 4, generator=generator, dtype=torch.float64) * 2 + 1
    weight = torch.rand(3, sum(sizes), generator=generator, dtype=torch.float64)
    expected_mean, expected = one_shot(x, weight)
    scatter, mean = stream(x, weight, sizes)
    np.testing.assert_allclose(scatter.mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(mean.mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(scatter.scatter, expected, rtol=1e-10, atol=1e-11)
    assert scatter.count == mean.count == sum(sizes)


def test_without_weights_every_token_counts_one():
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    scatter = RunningScatter()
    for part in x.split(4, 1):
        scatter.update(part)
    np.testing.assert_allclose(scatter.scatter, one_shot(x, torch.ones(2, 11))[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_precision(dtype):
    """E[xx^T] - mean mean^T would lose 8 decimal digits here, all that float32 has."""
    x = (torch.randn(2, 400, 3, dtype=torch.float64) + torch.tensor([1e4, -3e4, 2e4])).to(dtype)
    weight = torch.rand(2, 400, dtype=dtype)
    mean, expected = one_shot(x, weight)
    scatter, _ = stream(x, weight, [150, 1, 249])
    np.testing.assert_allclose(scatter.scatter, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(scatter.mean, mean, rtol=1e-9)


def test_result_is_float64_and_exactly_symmetric():
    scatter, mean = stream(torch.randn(2, 8, 5), torch.rand(2, 8), [3, 5])
    assert scatter.scatter.dtype == mean.mean.dtype == torch.float64
    assert torch.equal(scatter.scatter, scatter.scatter.transpose(1, 2))


def test_inputs_are_left_as_they_were():
    x, weight = torch.randn(1, 6, 2), torch.rand(1, 6)
    kept = x.clone(), weight.clone()
    stream(x, weight, [2, 4])
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


# ---- covariance under a mixture of token weights -------------------------------------------------------------------


def mixture(x, weight, share):
    """Mean ``[n]`` and covariance ``[n, n]`` under weights ``1 - share + share * w / mean(w)``, float64 numpy."""
    x, weight = x.double().numpy(), weight.double().numpy()
    mixed = 1 - share + share * weight / weight.mean()
    mean = np.average(x, axis=0, weights=mixed)
    return mean, np.einsum("t,ti,tj->ij", mixed, x - mean, x - mean) / len(x)


def stream_covariance(x, weight, share, sizes):
    running = RunningCovariance(share)
    for part, part_weight in zip(x.split(sizes), weight.split(sizes), strict=True):
        running.update(part, part_weight)
    return running.result()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_covariance_equals_the_one_shot_result_for_any_split(share, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64) * 2 + 1
    weight = torch.rand(sum(sizes), generator=generator, dtype=torch.float64) ** 3
    mean, covariance = stream_covariance(x, weight, share, sizes)
    expected_mean, expected = mixture(x, weight, share)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-11)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-11)
    assert mean.dtype == covariance.dtype == torch.float64


def test_covariance_without_weights_is_plain():
    x = torch.randn(30, 3, dtype=torch.float64)
    running = RunningCovariance(0.0)
    for part in x.split(7):
        running.update(part)
    np.testing.assert_allclose(running.result()[1], np.cov(x.numpy().T, bias=True), rtol=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_scale_of_the_weights_does_not_matter(share):
    x, weight = torch.randn(30, 3, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    for found, expected in zip(
        stream_covariance(x, weight * 1e-9, share, [30]), stream_covariance(x, weight, share, [30]), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("sizes", [[20], [5, 15], [1] * 20])
def test_weights_of_zero_fall_back_to_plain_ones(share, sizes):
    x = torch.randn(20, 3, dtype=torch.float64)
    mean, covariance = stream_covariance(x, torch.zeros(20), share, sizes)
    np.testing.assert_allclose(mean, x.mean(dim=0), rtol=1e-10)
    np.testing.assert_allclose(covariance, np.cov(x.numpy().T, bias=True), rtol=1e-9)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_batches_that_weigh_nothing_leave_the_weighted_part_alone(share):
    x, weight = torch.randn(20, 3, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    weight[:8] = weight[12:16] = 0
    mean, covariance = stream_covariance(x, weight, share, [8, 4, 4, 4])
    expected_mean, expected = mixture(x, weight, share)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10)
    np.testing.assert_allclose(covariance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_large_mean_costs_the_covariance_no_precision(share):
    """1e4 times the spread, in float32."""
    x = (torch.randn(400, 3, dtype=torch.float64) + torch.tensor([1e4, -3e4, 2e4])).float()
    weight = torch.rand(400)
    mean, covariance = stream_covariance(x, weight, share, [150, 1, 249])
    expected_mean, expected = mixture(x, weight, share)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8)


def test_covariance_is_symmetric_and_inputs_are_left_as_they_were():
    x, weight = torch.randn(50, 300), torch.rand(50)
    kept = x.clone(), weight.clone()
    _, covariance = stream_covariance(x, weight, 0.5, [20, 30])
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-6)
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 301, 512])
def test_gram_equals_the_plain_product(n, blocks):
    """Below and above the size from which blocks are mirrored, whether the blocks divide it or not."""
    x = torch.randn(9, n, dtype=torch.float64)
    torch.testing.assert_close(gram(x, blocks), x.T @ x, rtol=1e-12, atol=1e-12)
