"""The order of elimination, against elimination by full regressions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_maps import DEGENERATE, problem

from stratavit.calibration.elimination import elimination_order
from stratavit.elastic.compensation import RIDGE


def order_of(weight, covariance, *options):
    """Of one site."""
    return elimination_order(weight[None], [covariance], *options)[0].tolist()


def regularised(covariance):
    return covariance + RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()


def lost(weight, matrix, kept):
    """Output variance that no linear map of the kept channels can predict."""
    rest = matrix - matrix[:, kept] @ torch.linalg.solve(matrix[kept][:, kept], matrix[kept])
    return float((weight @ rest @ weight.T).trace())


def losses(weight, matrix, kept, candidates):
    """What is lost without each of the candidates."""
    return torch.tensor([lost(weight, matrix, [k for k in kept if k != c]) for c in candidates], dtype=torch.float64)


def slow_order(weight, covariance, block=1, candidates=1):
    """Backward elimination that solves the full regression again for every candidate."""
    matrix = regularised(covariance)
    kept, leaving = list(range(len(matrix))), []
    while kept:
        now = losses(weight, matrix, kept, kept) - lost(weight, matrix, kept)
        least = [kept[i] for i in now.argsort()[: block * candidates]]
        for _ in range(min(block, len(kept))):
            gone = least.pop(int(losses(weight, matrix, kept, least).argmin()))
            kept.remove(gone)
            leaving.append(gone)
    return leaving[::-1]


@given(seed=st.integers(0, 999), m=st.integers(1, 18), outputs=st.integers(2, 9))
def test_blocks_of_one_and_all_channels_as_candidates_give_the_greedy_order(seed, m, outputs):
    weight, covariance = problem(seed, m, outputs)
    expected = slow_order(weight, covariance)
    for block, candidates in ((1, 1), (1, 3), (3, 6), (5, 4), (64, 1)):
        assert order_of(weight, covariance, block, candidates) == expected


@given(seed=st.integers(0, 999), m=st.integers(1, 18), block=st.integers(1, 7), candidates=st.integers(1, 3))
def test_blocks_are_chosen_one_by_one_among_the_channels_of_least_loss(seed, m, block, candidates):
    weight, covariance = problem(seed, m)
    assert order_of(weight, covariance, block, candidates) == slow_order(weight, covariance, block, candidates)


@pytest.mark.parametrize("options", [(), (4, 2)])
def test_sites_together_equal_one_by_one_and_inputs_are_left_as_they_were(options):
    problems = [problem(seed, 50) for seed in range(3)]
    before = [(weight.clone(), covariance.clone()) for weight, covariance in problems]
    weights, covariances = zip(*problems, strict=True)
    found = elimination_order(torch.stack(weights), covariances, *options)
    assert found.tolist() == [order_of(*one, *options) for one in problems]
    assert all(
        torch.equal(*pair) for now, then in zip(problems, before, strict=True) for pair in zip(now, then, strict=True)
    )


def test_of_two_copies_of_a_channel_one_stays():
    """A copy costs nothing as long as the other one is there: a block must not take both."""
    weight, covariance = problem(5, 12)
    pick = [*range(12), *range(8)]
    order = order_of(weight[:, pick], covariance[pick][:, pick], 8, 2)
    assert sorted(pick[i] for i in order[:12]) == list(range(12))


@pytest.mark.parametrize("options", [(), (4, 2)])
def test_float32_chooses_what_float64_chooses(options):
    for seed in range(8):
        weight, covariance = problem(seed, 40)
        expected = order_of(weight, covariance, *options)
        assert order_of(weight.float(), covariance, *options) == expected
        assert order_of(weight.float(), covariance.float(), *options) == expected


@pytest.mark.parametrize("largest", [1.0, 1e3, 1e8])
def test_in_float32_an_order_loses_as_little_where_one_direction_is_far_above_all_others(largest):
    """The ridge is a share of the mean eigenvalue, so that it bounds the condition."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -6, 96, dtype=torch.float64)
    values[0] = largest
    covariance = (basis * values) @ basis.T
    covariance = (covariance + covariance.T) / 2
    weight = torch.randn(24, 96, generator=generator, dtype=torch.float64)
    kept = [order_of(one, covariance, 8, 4)[:48] for one in (weight, weight.float())]
    exact, found = (lost(weight, regularised(covariance), one) for one in kept)
    assert found <= 1.001 * exact


def narrowed(case):
    return lambda w, s: tuple(x.float() for x in DEGENERATE[case](w, s))


CASES = (
    DEGENERATE | {"float32": lambda w, s: (w.float(), s)} | {f"{case}, float32": narrowed(case) for case in DEGENERATE}
)


@pytest.mark.parametrize("options", [(), (2, 1), (2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_degenerate_input_has_an_order(case, options):
    assert sorted(order_of(*CASES[case](*problem(2)), *options)) == list(range(6))
