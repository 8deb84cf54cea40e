"""Outputs of the dense model are computed once per image, found by pixels, and dropped when the weights change."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_model, make_net

from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.data.pixels import Seen, keys_of
from stratavit.dropout_list.walk import Walk
from stratavit.utils import digest

IMAGES = make_images(6)


class Counted:
    """Outputs for an image: its sum and its first pixels; counts the images that it ran on."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images):
        self.asked += len(images)
        return images.sum(dim=(1, 2, 3))[:, None].repeat(1, 7), images[:, 0, 0, :4]


def assert_outputs(dense_outputs, images, compute):
    for found, expected in zip(dense_outputs.of(keys_of(images), images, compute), Counted()(images), strict=True):
        assert torch.equal(found, expected)


def test_an_image_is_computed_once_in_whatever_order_it_comes():
    dense_outputs, compute = DenseOutputs(), Counted()
    dense_outputs.add(keys_of(IMAGES[:2]), *Counted()(IMAGES[:2]))
    assert_outputs(dense_outputs, IMAGES[:4], compute)
    assert_outputs(dense_outputs, IMAGES[[5, 2, 2, 0]], compute)
    assert compute.asked == 3


def test_memory_is_bounded_and_what_does_not_fit_is_right():
    row = 4 * (7 + 4)
    dense_outputs, compute = DenseOutputs(limit=2 * row + 1), Counted()
    for _ in range(2):
        assert_outputs(dense_outputs, IMAGES, compute)
    assert compute.asked == 6 + 4


def test_hashes_do_not_depend_on_the_number_of_threads(monkeypatch):
    images, model, found, pools = make_images(7), make_model("plain"), [], []
    monkeypatch.setattr(digest, "LEAST_BYTES", 0)
    monkeypatch.setattr(
        digest, "ThreadPoolExecutor", lambda threads: pools.append(threads) or ThreadPoolExecutor(threads)
    )
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((keys_of(images), digest.digest_of(model.named_parameters())))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 7
    assert pools == [3, 3]
    monkeypatch.setattr(threading, "main_thread", lambda: threading.Thread())  # one that has ended: none can be started
    assert keys_of(images) == found[0][0]
    assert pools == [3, 3]


def one_bit(model):
    value = model.cls_token.data
    value[0, 0, 0] = torch.nextafter(value[0, 0, 0], torch.tensor(9.0, dtype=value.dtype))


def a_buffer(model):
    model.register_buffer("more", torch.zeros(1))


def two_exchanged(model):
    first, second = (block.norm1.weight.data for block in model.blocks)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


@pytest.mark.parametrize("change", [one_bit, a_buffer, two_exchanged, torch.nn.Module.float])
def test_a_change_of_weights_is_noticed(change):
    model, dense_outputs = make_model("plain", dtype=torch.bfloat16), DenseOutputs()
    dense_outputs.seal(model)
    assert dense_outputs.belong_to(copy.deepcopy(model))  # the same numbers elsewhere
    change(model)
    assert not dense_outputs.belong_to(model)


def computed(monkeypatch, net, plan=PLAN):
    """Images that the dense model runs on while the list is made."""
    asked, original = [], DenseOutputs.of

    def watched(self, keys, images, compute):
        return original(self, keys, images, lambda unknown: (asked.append(len(unknown)), compute(unknown))[1])

    with monkeypatch.context() as patch:
        patch.setattr(DenseOutputs, "of", watched)
        net.stratify(make_batches(), plan=plan)
    return sum(asked)


@pytest.mark.parametrize("changed", [False, True])
def test_stratify_uses_the_outputs_of_contract_unless_weights_changed_since(monkeypatch, changed):
    net = copy.deepcopy(make_net("plain"))
    if changed:
        net.model.head.weight.data.mul_(-3)
    forgetful = copy.deepcopy(net)
    forgetful._dense_outputs = None
    assert computed(monkeypatch, net) == (12 if changed else 0)
    assert computed(monkeypatch, forgetful) == 12
    assert net.strata.entries == forgetful.strata.entries
    assert torch.allclose(net.final_mean.vectors, forgetful.final_mean.vectors, atol=1e-5)
    assert net._dense_outputs is None


def test_each_image_is_computed_once_however_often_it_comes(monkeypatch):
    net = copy.deepcopy(make_net("plain"))
    net._dense_outputs = None
    assert computed(monkeypatch, net, Walk(states=((0.7, 3), (0.5, 3)), images=6)) == 12


def test_which_images_were_seen():
    seen, keys = Seen(), keys_of(IMAGES)
    assert seen.share(keys) == 0
    for part in (keys[:2], [], keys[2:3]):
        seen.add(part)
    assert [seen.share(part) for part in (keys, keys[:3], keys[3:], keys[2:4], [])] == [0.5, 1, 0, 0.5, 0]
