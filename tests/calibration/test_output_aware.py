"""Output-aware coordinates, against direct computations."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from linear_maps import DEGENERATE, problem

from stratavit.calibration.output_aware import BALANCE_FLOOR, FLOOR, output_axes

SHAPES = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 12))  # seed, coordinates, outputs


def lost(weight, covariance, kept):
    """Output variance that no linear map of the kept channels can predict."""
    inverse = torch.linalg.pinv(covariance[kept][:, kept], hermitian=True)
    rest = covariance - covariance[:, kept] @ inverse @ covariance[kept]
    return float((weight @ rest @ weight.T).trace())


def singular_values(weight, covariance):
    """Of the map times the root of the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return torch.linalg.svdvals(weight @ (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


@given(SHAPES)
def test_axes_have_an_inverse_and_leave_kept_and_cut_coordinates_uncorrelated(shape):
    weight, covariance = problem(*shape)
    forward, backward = output_axes(weight, covariance)
    identity = torch.eye(shape[1], dtype=torch.float64)
    for product in (forward @ backward, backward @ forward):
        torch.testing.assert_close(product, identity, rtol=0, atol=1e-8)
    values = torch.linalg.eigvalsh(covariance)
    assume(values[0] > FLOOR * values[-1])  # a floored direction keeps a correlation
    turned = forward @ covariance @ forward.T
    scale = turned.diagonal().sqrt()
    torch.testing.assert_close(turned / torch.outer(scale, scale), identity, rtol=0, atol=1e-3)


@given(SHAPES, st.sampled_from([1e-6, 1, 1e6]), st.sampled_from([1e-6, 1, 1e6]))
def test_a_cut_loses_the_smallest_singular_values(shape, a, b):
    """Eckart and Young: no other map of rank w could lose less, whatever the scale of weights and channels."""
    weight, covariance = problem(*shape)
    forward, backward = output_axes(a * weight, b * b * covariance)
    sigma = singular_values(weight, covariance)
    for keep in range(1, shape[1]):
        found = lost(weight @ backward, forward @ covariance @ forward.T, list(range(keep)))
        assert found == pytest.approx(float(sigma[keep:].square().sum()), abs=1e-4 * float(sigma.square().sum()))


def test_scale_is_shared_between_both_sides():
    """A coordinate's variance and the squared norm of its column are alike, and fall."""
    weight, covariance = problem(3)
    forward, backward = output_axes(weight, covariance)
    variances = (forward @ covariance @ forward.T).diagonal()
    torch.testing.assert_close(variances, (weight @ backward).square().sum(dim=0), rtol=1e-6, atol=0)
    assert (variances[:-1] >= variances[1:]).all()
    assert float(variances[0]) == pytest.approx(float(singular_values(weight, covariance)[0]), rel=1e-6)


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_has_a_finite_transform_that_can_be_undone(case):
    weight, covariance = DEGENERATE[case](*problem(2))
    forward, backward = output_axes(weight.float(), covariance)
    assert forward.dtype == backward.dtype == torch.float64
    assert forward.isfinite().all()
    assert backward.isfinite().all()
    torch.testing.assert_close(forward @ backward, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(torch.linalg.cond(forward)) <= 1.01 * (BALANCE_FLOOR * FLOOR) ** -0.5


def test_heads_and_sites_together_equal_one_by_one_and_signs_are_fixed():
    problems = [problem(seed, 8, outputs=5) for seed in range(6)]
    weight, covariance = (torch.stack(side).unflatten(0, (2, 3)) for side in zip(*problems, strict=True))
    together = output_axes(weight, covariance)
    for number, (own, found) in enumerate(problems):
        for side, expected in zip(together, output_axes(own, found), strict=True):
            torch.testing.assert_close(side.flatten(0, 1)[number], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(together[0], output_axes(-weight, covariance)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_left_as_they_were(dtype):
    weight, covariance = (t.to(dtype) for t in problem(1, 20))
    before = weight.clone(), covariance.clone()
    output_axes(weight, covariance)
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])
