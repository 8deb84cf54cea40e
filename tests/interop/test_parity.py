"""Which images tell whether a file computes what its model does: all but those whose merges another one may decide."""

import math

import pytest
import torch
from helpers import make_images, make_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stratavit import StrataViTError
from stratavit.elastic.merging import MergingBlock, similarities, split
from stratavit.interop import parity
from stratavit.interop.parity import FLOOR, TOLERANCE, compared, merge_margins

IMAGES = make_images(5, seed=3)
KEPT = 12
SPECS = {"merging": {"blocks.0.tokens": KEPT}, "cut": {"blocks.1.mlp": 20}}


def small(kind="merging"):
    return make_net("plain").extract(spec=SPECS[kind], verbose=False).eval()


def answered(model, wrong, by=1.0):
    """Compares a file that is wrong on so many of the images, the second one first."""
    with torch.no_grad():
        expected = model(IMAGES)
    answers = expected.clone()
    answers[1 : 1 + wrong] += by
    return compared(lambda batch: answers[: len(batch)], model, expected, [IMAGES, IMAGES[:1]], "onnx", TOLERANCE)


@pytest.mark.parametrize("wrong", [1, 2])
def test_images_whose_merges_are_tied_are_left_out(monkeypatch, wrong):
    monkeypatch.setattr(parity, "TIED", 1e9)
    difference, tied = answered(small(), wrong)
    assert (difference, tied) == (0.0, wrong)
    assert answered(small(), wrong, by=0.0) == (0.0, 0)  # nothing differs: nothing is left out


def test_an_image_that_differs_only_alone_counts_once(monkeypatch):
    monkeypatch.setattr(parity, "TIED", 1e9)
    model = small()
    with torch.no_grad():
        expected = model(IMAGES)
    batches = [IMAGES, IMAGES[:1]]
    found = compared(
        lambda batch: expected[: len(batch)] + (len(batch) == 1), model, expected, batches, "onnx", TOLERANCE
    )
    assert found == (0.0, 1)


@pytest.mark.parametrize(
    ("kind", "bound", "wrong", "by"),
    [
        ("merging", -1.0, 1, 1.0),  # no merge is tied
        ("cut", 1e9, 1, 1.0),  # nothing merges
        ("merging", 1e9, 1, math.nan),
    ],
)
def test_all_other_differences_are_refused(monkeypatch, kind, bound, wrong, by):
    monkeypatch.setattr(parity, "TIED", bound)
    with pytest.raises(StrataViTError, match="onnx file"):
        answered(small(kind), wrong, by)


def test_without_half_of_the_images_other_ones_are_asked_for(monkeypatch):
    monkeypatch.setattr(parity, "TIED", 1e9)
    with pytest.raises(StrataViTError, match="other images"):
        answered(small(), wrong=3)


@pytest.mark.parametrize("scale", [1e-6, 1e6, 0.0])
@pytest.mark.parametrize(("error", "sound"), [(0.5, True), (2.0, False), (float("nan"), False)])
def test_the_limit_is_a_share_of_the_largest_logit_of_every_image(scale, error, sound):
    expected = scale * torch.ones(3, 7)
    expected[0] *= 1000  # of no consequence to the other images
    found = expected.clone()
    found[1, 2] += error * (TOLERANCE * scale + FLOOR)
    asked = (lambda images: found, nn.Identity(), expected, [expected], "onnx", TOLERANCE)
    if sound:
        difference, tied = compared(*asked)
        assert difference <= TOLERANCE * scale + FLOOR
        assert tied == 0
    else:
        with pytest.raises(StrataViTError, match="onnx file"):
            compared(*asked)


@pytest.mark.parametrize(("removed", "expected"), [(0, math.inf), (1, 0.2), (2, 0.01), (3, 0.01)])
def test_the_margin_is_the_least_gap_that_decides(removed, expected):
    similar = torch.tensor([[[0.9, 0.5], [0.7, 0.69], [0.2, 0.1]]], dtype=torch.float64)
    assert float(parity._margin(similar, removed)) == pytest.approx(expected)


def choices(similar, removed):
    """Who joins whom."""
    best, nearest = similar[0].max(dim=-1)
    return {(int(source), int(nearest[source])) for source in best.topk(removed).indices}


@given(sources=st.integers(1, 8), targets=st.integers(1, 4), seed=st.integers(0, 999), data=st.data())
def test_merges_stay_as_they_are_while_cosines_move_by_less_than_half_the_margin(sources, targets, seed, data):
    generator = torch.Generator().manual_seed(seed)
    similar = 2 * torch.rand(1, sources, targets, generator=generator, dtype=torch.float64) - 1
    removed = data.draw(st.integers(1, sources))
    reach = min(0.49 * float(parity._margin(similar, removed)), 1.0)
    moved = similar + reach * (2 * torch.rand(similar.shape, generator=generator, dtype=torch.float64) - 1)
    assert choices(moved, removed) == choices(similar, removed)


def test_margins_are_those_of_what_the_blocks_compare():
    model, seen = small(), []
    block = next(module for module in model.modules() if isinstance(module, MergingBlock) and module.keep)
    handle = block.norm1.register_forward_hook(lambda module, inputs, normed: seen.append(normed))
    margins = merge_margins(model, IMAGES)
    handle.remove()
    patches = seen[0].shape[1] - block.prefix
    similar = similarities(seen[0][:, block.prefix :], *split(patches, seen[0].device))
    assert torch.equal(margins, parity._margin(similar, patches - KEPT))
    assert margins.isfinite().all()
    assert not any(module._forward_hooks for module in model.modules())
    assert merge_margins(small("cut"), IMAGES).tolist() == [math.inf] * len(IMAGES)
