"""The maths of WPAC on cases solved on paper, and its invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratavit.calibration.accumulators import RunningScatter
from stratavit.calibration.site_observer import SiteStatistics
from stratavit.calibration.wpac import attention_transform, mlp_order, principal_axes

GENERATOR = torch.Generator()


def scatters(heads, dim, seed=0):
    """Random symmetric positive definite matrices ``[heads, dim, dim]``."""
    x = torch.randn(heads, 3 * dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.transpose(1, 2) @ x


def statistics_of(taylor=None, hessian=None, scatter=None):
    return SiteStatistics(taylor, hessian, torch.zeros(1, 1), scatter)


LINE = [[3.0, 4.0], [-3.0, -4.0], [6.0, 8.0], [-6.0, -8.0]]  # points at +-(3, 4) k
CROSS = [[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]  # +-2 along x, +-1 along y


@pytest.mark.parametrize(
    ("points", "weight", "expected"),
    [
        (LINE, [1.0, 1, 1, 1], [[0.6, 0.8], [0.8, -0.6]]),
        (CROSS, [1.0, 1, 1, 1], [[1.0, 0.0], [0.0, 1.0]]),  # alike, x leads
        (CROSS, [1.0, 1, 9, 9], [[0.0, 1.0], [1.0, 0.0]]),  # with y's tokens weighted 9 times, y leads
    ],
)
def test_axes_solved_on_paper(points, weight, expected):
    running = RunningScatter()
    running.update(torch.tensor(points).double()[None] + 100, torch.tensor([weight]).double())
    torch.testing.assert_close(principal_axes(running.scatter)[0].T, torch.tensor(expected).double())


@given(st.integers(0, 50), st.integers(1, 9))
def test_axes_are_orthonormal_and_diagonalise_in_falling_order(seed, dim):
    scatter = scatters(2, dim, seed)
    axes = principal_axes(scatter)
    torch.testing.assert_close(axes.transpose(1, 2) @ axes, torch.eye(dim, dtype=torch.float64).expand(2, -1, -1))
    turned = axes.transpose(1, 2) @ scatter @ axes
    values = turned.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned, torch.diag_embed(values), rtol=0, atol=1e-9 * float(values.max()))
    assert (values[:, :-1] >= values[:, 1:] - 1e-9 * values.max()).all()
    assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()  # signs, whatever the library's
    assert principal_axes(scatter.float()).dtype == torch.float64


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "magnitude"])
def test_rankings_sort_by_their_own_scores(criterion):
    """Head 0: v scores 1, 3, 2 and q + k scores 4, 5, 9; the other criteria would order differently."""
    scores = torch.tensor([[[3.0, 0.0, 5.0]], [[1.0, 5.0, 4.0]], [[1.0, 3.0, 2.0]]], dtype=torch.float64)
    inputs = dict.fromkeys(("taylor", "hessian", "magnitude"), -scores) | {criterion: scores}
    statistics = statistics_of(inputs["taylor"], inputs["hessian"])
    found = attention_transform(statistics, criterion, inputs["magnitude"], GENERATOR)
    coordinates = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    assert (found.v[0] @ coordinates).tolist() == [20, 30, 10]
    assert (found.q[0] @ coordinates).tolist() == (found.k[0] @ coordinates).tolist() == [30, 20, 10]


@pytest.mark.parametrize(
    ("criterion", "order"),
    [("taylor", [2, 1, 0]), ("hessian", [1, 0, 2]), ("wpac", [1, 0, 2]), ("pca", [1, 0, 2]), ("magnitude", [0, 2, 1])],
)
def test_mlp_orders(criterion, order):
    taylor, hessian = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[2.0, 3.0, 1.0]]])
    norms, same = torch.tensor([[[3.0, 1.0, 2.0]]]), torch.ones(1, 1, 40)
    assert mlp_order(statistics_of(taylor, hessian), criterion, norms, GENERATOR).tolist() == order
    assert mlp_order(statistics_of(same, same), criterion, same, GENERATOR).tolist() == list(range(40))  # ties stay
