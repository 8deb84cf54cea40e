"""Output-aware coordinates and the order of elimination, against direct computations."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from stratavit.calibration.output_aware import BALANCE_FLOOR, FLOOR, elimination_order, output_axes
from stratavit.elastic.compensation import RIDGE

SHAPES = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 12))  # seed, coordinates, outputs


def problem(seed, dim=6, outputs=10):
    """A map ``[outputs, dim]`` and a covariance ``[dim, dim]`` of uneven spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, dim, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * dim, dim, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, dim) @ torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def lost(weight, covariance, keep):
    """Output variance that no linear map of the first coordinates can predict: the Schur complement."""
    k, d = slice(None, keep), slice(keep, None)
    rest = covariance[d, d] - covariance[d, k] @ torch.linalg.pinv(covariance[k, k], hermitian=True) @ covariance[k, d]
    return float((weight[:, d] @ rest @ weight[:, d].T).trace())


def root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@given(SHAPES)
def test_axes_have_an_inverse_and_leave_kept_and_cut_coordinates_uncorrelated(shape):
    weight, covariance = problem(*shape)
    forward, backward = output_axes(weight, covariance)
    identity = torch.eye(shape[1], dtype=torch.float64)
    assert forward.dtype == backward.dtype == torch.float64
    for product in (forward @ backward, backward @ forward):
        torch.testing.assert_close(product, identity, rtol=0, atol=1e-8)
    values = torch.linalg.eigvalsh(covariance)
    assume(values[0] > FLOOR * values[-1])  # a floored direction keeps a correlation
    turned = forward @ covariance @ forward.T
    scale = turned.diagonal().sqrt()
    torch.testing.assert_close(turned / torch.outer(scale, scale), identity, rtol=0, atol=1e-3)


@given(SHAPES)
def test_a_cut_loses_the_smallest_singular_values(shape):
    """Eckart and Young: no other coordinates, and no other map of rank w, could lose less."""
    weight, covariance = problem(*shape)
    forward, backward = output_axes(weight, covariance)
    sigma = torch.linalg.svdvals(weight @ root(covariance))
    for keep in range(1, shape[1]):
        found = lost(weight @ backward, forward @ covariance @ forward.T, keep)
        assert found == pytest.approx(float(sigma[keep:].square().sum()), abs=1e-4 * float(sigma.square().sum()))


def test_scale_is_shared_between_both_sides():
    """A coordinate's variance and the squared norm of its column are alike, and fall."""
    weight, covariance = problem(3)
    forward, backward = output_axes(weight, covariance)
    variances = (forward @ covariance @ forward.T).diagonal()
    norms = (weight @ backward).square().sum(dim=0)
    torch.testing.assert_close(variances, norms, rtol=1e-6, atol=0)
    assert (variances[:-1] >= variances[1:]).all()
    assert float(variances[0]) == pytest.approx(float(torch.linalg.svdvals(weight @ root(covariance))[0]), rel=1e-6)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_axes_do_not_depend_on_the_scale_of_weights_and_channels(seed, a, b):
    """Up to the scale that both sides share."""
    weight, covariance = problem(seed)
    forward, _ = output_axes(weight, covariance)
    other, _ = output_axes(a * weight, b * b * covariance)
    torch.testing.assert_close(other, forward * (a / b) ** 0.5, rtol=1e-5, atol=1e-7 * float(other.abs().max()))


DEGENERATE = {
    "singular covariance": lambda w, s: (w, s[:, :3] @ s[:3]),
    "covariance of rank one": lambda w, s: (w, torch.outer(s[0], s[0])),
    "zero covariance": lambda w, s: (w, s * 0),
    "zero weight": lambda w, s: (w * 0, s),
    "both zero": lambda w, s: (w * 0, s * 0),
    "more coordinates than outputs": lambda w, s: (w[:2], s),
    "equal columns": lambda w, s: (w[:, :1].expand_as(w), s),
    "tiny": lambda w, s: (w * 1e-12, s * 1e-24),
    "huge": lambda w, s: (w * 1e12, s * 1e24),
    "one constant channel": lambda w, s: (w, s * (torch.arange(6) != 2) * (torch.arange(6) != 2)[:, None]),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_input_has_a_finite_transform_that_can_be_undone_and_an_order(case, dtype):
    weight, covariance = DEGENERATE[case](*problem(2))
    forward, backward = output_axes(weight.to(dtype), covariance)
    assert forward.isfinite().all()
    assert backward.isfinite().all()
    torch.testing.assert_close(forward @ backward, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(torch.linalg.cond(forward)) <= 1.01 * (BALANCE_FLOOR * FLOOR) ** -0.5
    for block in (1, 64):
        assert sorted(elimination_order(weight.to(dtype), covariance, block).tolist()) == list(range(6))


# ---- elimination ---------------------------------------------------------------------------------------------------


def slow_order(weight, covariance):
    """Backward elimination that solves the full regression again for every candidate."""
    matrix = covariance + RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()
    kept, leaving = list(range(len(matrix))), []
    while kept:
        losses = []
        for channel in kept:
            rest = [other for other in kept if other != channel]
            losses.append(remaining_error(weight, matrix, rest))
        leaving.append(kept.pop(int(torch.tensor(losses, dtype=torch.float64).argmin())))
    return leaving[::-1]


def remaining_error(weight, matrix, kept):
    """Output variance that the kept channels cannot predict."""
    inverse = torch.linalg.inv(matrix[kept][:, kept])
    rest = matrix - matrix[:, kept] @ inverse @ matrix[kept]
    return float((weight @ rest @ weight.T).trace())


@pytest.mark.parametrize("block", [1, 3, 64])
@given(seed=st.integers(0, 999))
def test_order_equals_elimination_by_full_regressions(block, seed):
    weight, covariance = problem(seed, dim=18)
    assert elimination_order(weight, covariance, block).tolist() == slow_order(weight, covariance)


@given(seed=st.integers(0, 999), m=st.integers(1, 40), outputs=st.integers(2, 9))
def test_order_is_a_permutation_whatever_the_block(seed, m, outputs):
    weight, covariance = problem(seed, m, outputs)
    orders = [elimination_order(weight, covariance, block).tolist() for block in (1, 7, 64)]
    assert sorted(orders[0]) == list(range(m))
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_left_as_they_were_and_signs_are_fixed(dtype):
    weight, covariance = (t.to(dtype) for t in problem(1, 20))
    before = weight.clone(), covariance.clone()
    elimination_order(weight, covariance, 4)
    assert torch.equal(output_axes(weight, covariance)[0], output_axes(-weight, covariance)[0])
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])


def test_one_of_two_alike_goes_first_and_its_twin_stays():
    """Alone, both matter most: what decides is what the others can make up for."""
    weight, covariance = problem(6, 12, 20)
    covariance = torch.eye(12, dtype=torch.float64) + 0.1 * covariance / covariance.diagonal().max()
    twin = torch.arange(12)
    twin[7] = 3
    covariance = covariance[twin][:, twin]
    weight[:, [3, 7]] *= 5
    order = elimination_order(weight, covariance).tolist()
    assert order[-1] in (3, 7)
    assert order[0] in (3, 7)


def test_channels_that_nothing_reads_or_that_never_change_go_first():
    weight, _ = problem(8, 10, 12)
    weight[:, 4] = 0
    order = elimination_order(weight, torch.diag((torch.arange(10) != 6).double())).tolist()
    assert set(order[-2:]) == {4, 6}
