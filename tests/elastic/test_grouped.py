"""Plain attention of hierarchical families: the elastic module, timm's and the small one compute the same."""

import copy
import io

import pytest
import torch
from helpers import enliven, relative_error
from timm.models import davit, hiera, hieradet_sam2, nest, volo
from torch import nn

from stratavit.elastic.exchanged import AttentionTransform
from stratavit.elastic.layers import tokens_in_view
from stratavit.elastic.running import Run, running
from stratavit.models.extraction import small_site
from stratavit.models.families import KINDS

DIM, HEADS = 24, 3
CASES = {  # timm's module, tokens of two images, tokens that each sees
    "davit": (davit.WindowAttention(DIM, (3, 3), HEADS), (8, 9, DIM), 9),
    "volo": (volo.Attention(DIM, HEADS, qkv_bias=True), (2, 3, 4, DIM), 12),
    "nest": (nest.Attention(DIM, HEADS, qkv_bias=True), (2, 4, 9, DIM), 9),
    "hiera": (hiera.MaskUnitAttention(DIM, DIM, HEADS, 1, 4, True), (2, 12, DIM), 4),
    "hiera, global": (hiera.MaskUnitAttention(DIM, DIM, HEADS, 1, 4, False), (2, 12, DIM), 12),
    "sam 2": (hieradet_sam2.MultiScaleAttention(DIM, DIM, HEADS), (2, 3, 4, DIM), 12),
    "nest, no bias": (nest.Attention(DIM, HEADS), (2, 4, 9, DIM), 9),
}


@pytest.fixture(params=CASES)
def case(request):
    stock, shape, seen = CASES[request.param]
    stock = enliven(copy.deepcopy(stock)).eval()
    return stock, KINDS[type(stock)](copy.deepcopy(stock)).eval(), torch.randn(shape), seen


def turned():
    """A random rotation of the coordinates of every head."""
    qk, v = (torch.linalg.qr(torch.randn(HEADS, DIM // HEADS, DIM // HEADS).double())[0] for _ in range(2))
    return AttentionTransform(qk, qk, v, v.mT)


@torch.no_grad()
def test_full_width_is_timms_before_and_after_rotations(case):
    stock, elastic, x, _ = case
    assert relative_error(elastic(x), stock(x)) < 1e-6
    elastic.fold(turned())
    assert relative_error(elastic(x), stock(x)) < 1e-5


@pytest.mark.parametrize("width", [1, 5, 8])
@torch.no_grad()
def test_small_is_elastic_in_every_form(case, width):
    stock, elastic, x, _ = case
    elastic.fold(turned())
    small = small_site(elastic.site("attn"), elastic, width).eval()
    with running(Run({elastic: width})):
        found = elastic(x)
    assert relative_error(small(x), found) < 1e-5
    assert (relative_error(found, stock(x)) < 1e-5) == (width == 8)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(small), file)
    file.seek(0)
    assert relative_error(torch.jit.load(file)(x), found) < 1e-5


def test_a_change_of_one_token_reaches_the_tokens_that_costs_count(case):
    stock, elastic, x, seen = case
    small = small_site(elastic.site("attn"), elastic, 4).eval()
    other = x.clone()
    other.view(-1, DIM)[0] += 1
    for module in (stock, elastic, small):
        assert tokens_in_view(module, x) == seen
        with torch.no_grad():
            assert (module(other) != module(x)).any(dim=-1).sum() == seen


def test_gradients_reach_the_weights(case):
    _, elastic, x, _ = case
    with running(Run({elastic: 4})):
        elastic(x).square().sum().backward()
    kept = elastic.out_by_head()
    assert isinstance(elastic.out, nn.Linear)
    gradient = elastic.proj.weight.grad
    assert gradient.count_nonzero() == kept.numel() // 2
