"""Streaming moments equal moments computed at one go."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratavit.moments import RunningMean, RunningScatter


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
