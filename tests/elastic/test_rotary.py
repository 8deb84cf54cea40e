"""Rotary attention cut by rotation pairs: what a pair adds to the scores, which go first, and what is left."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from helpers import make_images, relative_error
from safetensors.torch import load_file, save_file

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.elastic.plain import picked, rotated
from stratavit.elastic.rotary import ElasticRotary, order_of_pairs, pair_products
from stratavit.elastic.site import rotary_width

INTERLEAVED, HALF, MIXED = "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"
IMAGES = make_images(4, seed=3)
BATCHES = [(make_images(12), torch.arange(12) % 7)]
B, N, H, P = 2, 9, 3, 4  # one token in front that is not rotated


def rope(half, seed=1):
    angles = torch.randn(N - 1, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angles = angles.repeat(1, 2) if half else angles.repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def columns(pairs, half):
    first, second = (pairs, pairs + P) if half else (2 * pairs, 2 * pairs + 1)
    return torch.cat([first, second]) if half else torch.stack([first, second], dim=-1).flatten()


def random_qk(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, H, N, 2 * P, generator=generator, dtype=torch.float64) for _ in range(2))


def scores(q, k, turns, half):
    q, k = (rotated(x, turns, 1, half) for x in (q, k))
    return q @ k.mT


def terms(q, k, half):
    """What each pair adds to the scores, ``[P, B, H, N, N]``: from one pair at a time."""
    each = [columns(torch.tensor([pair]), half) for pair in range(P)]
    return torch.stack([scores(q[..., c], k[..., c], picked(rope(half), c), half) for c in each])


@pytest.mark.parametrize("half", [False, True])
def test_scores_are_a_sum_over_pairs(half):
    """In any order, of any of them; and a pair may be turned and scaled if q and k are so in opposite ways."""
    q, k = random_qk()
    each = terms(q, k, half)
    assert torch.allclose(each.sum(dim=0), scores(q, k, rope(half), half))
    some = torch.tensor([3, 0])
    kept = columns(some, half)
    found = scores(q[..., kept], k[..., kept], picked(rope(half), kept), half)
    assert torch.allclose(found, each[some].sum(dim=0))
    turn, angle, scale = torch.eye(2 * P, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), 1.9
    i, j = columns(torch.tensor([2]), half).tolist()
    turn[i, i] = turn[j, j] = angle.cos()
    turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
    q_scale = torch.ones(2 * P, dtype=torch.float64)
    q_scale[[i, j]] = scale
    changed = scores(q @ turn.T * q_scale, k @ turn.T / q_scale, rope(half), half)
    assert torch.allclose(changed, scores(q, k, rope(half), half))


@pytest.mark.parametrize("half", [False, True])
def test_products_of_pairs_are_those_of_their_terms(half):
    q, k = random_qk()
    each = terms(q, k, half)
    each = (each - each.mean(dim=-1, keepdim=True)).flatten(1)  # the softmax does not see what all keys share
    found = pair_products(*(rotated(x, rope(half), 1, half) for x in (q, k)), half)
    assert torch.allclose(found.double() * N, each @ each.T, rtol=1e-4, atol=1e-3)


def test_the_pair_goes_that_moves_the_scores_least():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.1, 1.0, 2.0])[:, None]
    assert order_of_pairs(x @ x.T).tolist() == [0, 3, 2, 1]
    u, w = torch.eye(2)
    x = torch.stack(
        [u, -1.05 * u, 1.02 * w]
    )  # the second makes up for the first, so it goes next, although it is larger
    assert order_of_pairs(x @ x.T).tolist() == [2, 1, 0]


@pytest.mark.parametrize("name", [INTERLEAVED, HALF, MIXED])
def test_a_cut_is_the_model_without_pairs(name):
    """The stock module with zeros in q for the pairs, and in v for the channels, that are cut."""
    net = SuperNet(architectures.make(name)).contract(BATCHES).eval()
    net.compensation = "none"
    zeroed, orders = copy.deepcopy(net), []
    for module in zeroed.elastic.values():
        if module.attention:
            width, full = 4, module.full_width
            gone = module.columns(full)[:0] if rotary_width(width, full) == full else cut_columns(module, width)
            orders.append(module.pairs.tolist())
            with torch.no_grad():
                q, _, _ = module.parts()
                for tensor in q:
                    if tensor is not None:
                        tensor.unflatten(0, (module.heads, -1))[:, gone] = 0
                module.proj.weight.unflatten(1, (module.heads, -1))[:, :, width:] = 0
    spec = {site.name: 4 for site in net.sites if site.kind == "attention"}
    small = net.extract(spec=spec)
    with torch.no_grad():
        assert relative_error(net(IMAGES, spec), zeroed(IMAGES)) < 1e-5
        assert relative_error(small(IMAGES), zeroed(IMAGES)) < 1e-5
        assert relative_error(net(IMAGES, spec), net(IMAGES)) > 1e-3
    assert small.blocks[0].attn.q.out_features == 2 * 8
    assert small.blocks[0].attn.kept.tolist() == net.elastic["blocks.0.attn"].columns(8).tolist()
    assert any(order != sorted(order) for order in orders)


def cut_columns(module, width):
    kept = module.columns(rotary_width(width, module.full_width)).tolist()
    return [column for column in range(module.full_width) if column not in kept]


def test_the_order_is_kept_in_files(tmp_path):
    net = SuperNet(architectures.make(HALF)).contract(BATCHES).eval()
    spec = {site.name: 4 for site in net.sites if site.kind == "attention"}
    for moments in (True, False):
        net.save(tmp_path / "net", overwrite=True, moments=moments)
        loaded = SuperNet.load(tmp_path / "net")
        for name, module in net.elastic.items():
            if isinstance(module, ElasticRotary):
                assert torch.equal(loaded.elastic[name].pairs, module.pairs)
    small = net.extract(spec=spec)
    stratavit.save(small, tmp_path / "small")
    back = stratavit.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(back(IMAGES), small(IMAGES))
    file = tmp_path / "net" / "moments.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"blocks.0.attn.pairs": tensors["blocks.0.attn.pairs"] * 0}, file)
    info = tmp_path / "net" / "stratavit.json"
    info.write_text(info.read_text().replace('"hashes"', '"ignored"'))
    with pytest.raises(StrataViTError, match=r"blocks\.0\.attn\.pairs should be the numbers from 0 to 7"):
        SuperNet.load(tmp_path / "net")


def test_widths_of_q_and_k_follow_v():
    assert [rotary_width(width, 64) for width in (0, 1, 2, 6, 7, 8, 64)] == [0, 8, 16, 48, 56, 64, 64]
    assert [rotary_width(width, 6) for width in (0, 1, 2, 5, 6)] == [0, 2, 2, 6, 6]
    net = SuperNet(architectures.make(INTERLEAVED))
    name = net.sites[0].name
    assert net.resolve({name: {"qk": 8, "v": 4}}) == net.resolve({name: 4})
    with pytest.raises(StrataViTError, match="is 8 there; asked qk 16 with v 4"):
        net.resolve({name: {"qk": 16, "v": 4}})


def test_a_model_of_the_class_without_rotary_positions_keeps_q_and_k():
    net = SuperNet(architectures.make("eva_giant_patch14_224"))
    assert not any(isinstance(module, ElasticRotary) for module in net.elastic.values())
