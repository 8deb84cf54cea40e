"""Answers of the dense model are computed once per image, found by pixels, and dropped when the weights change."""

import copy

import pytest
import torch
from helpers import PLAN, make_batches, make_images, make_model

from stratavit import SuperNet
from stratavit.calibration.dense_outputs import DenseOutputs, weights_digest
from stratavit.data.pixels import Seen, keys_of
from stratavit.dropout_list import marginal_effects
from stratavit.dropout_list.walk import Walk

IMAGES = make_images(6)


class Counted:
    """Answers an image by its sum and its first pixels; counts the images that it was asked for."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images):
        self.asked += len(images)
        return images.sum(dim=(1, 2, 3))[:, None].repeat(1, 7), images[:, 0, 0, :4]


def test_an_image_is_computed_once_in_whatever_order_it_comes():
    dense_outputs, compute = DenseOutputs(), Counted()
    dense_outputs.of(IMAGES[:4], compute)
    logits, features = dense_outputs.of(IMAGES[[5, 2, 2, 0]], compute)
    assert compute.asked == 5
    expected = Counted()(IMAGES[[5, 2, 2, 0]])
    assert torch.equal(logits, expected[0])
    assert torch.equal(features, expected[1])


def test_given_answers_are_found():
    dense_outputs, compute = DenseOutputs(), Counted()
    dense_outputs.add(keys_of(IMAGES), *Counted()(IMAGES))
    logits, _ = dense_outputs.of(IMAGES.flip(0), compute)
    assert compute.asked == 0
    assert torch.equal(logits, Counted()(IMAGES.flip(0))[0])


def test_memory_is_bounded_and_what_does_not_fit_is_right():
    row = 4 * (7 + 4)
    dense_outputs, compute = DenseOutputs(limit=2 * row + 1), Counted()
    for _ in range(2):
        logits, _ = dense_outputs.of(IMAGES, compute)
        assert torch.equal(logits, Counted()(IMAGES)[0])
    assert len(dense_outputs) == 2
    assert compute.asked == 6 + 4


def through_data(model):
    model.blocks[1].mlp.fc2.weight.data.mul_(1.01)


def through_numpy(model):
    model.head.bias.detach().numpy()[0] += 1


def one_bit(model):
    value = model.cls_token.data
    value[0, 0, 0] = torch.nextafter(value[0, 0, 0], torch.tensor(9.0))


def another_tensor(model):
    model.norm.weight = torch.nn.Parameter(model.norm.weight * 2)


def a_buffer(model):
    model.register_buffer("more", torch.zeros(1))


def two_exchanged(model):
    first, second = (block.norm1.weight.data for block in model.blocks)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


CHANGES = (through_data, through_numpy, one_bit, another_tensor, a_buffer, two_exchanged, torch.nn.Module.double)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_weights_is_noticed(change):
    model, dense_outputs = make_model("plain"), DenseOutputs()
    dense_outputs.seal(model)
    assert dense_outputs.belong_to(model)
    change(model)
    assert not dense_outputs.belong_to(model)


def test_the_same_numbers_elsewhere_are_no_change():
    model, dense_outputs = make_model("plain"), DenseOutputs()
    dense_outputs.seal(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert dense_outputs.belong_to(model)
    assert dense_outputs.belong_to(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type_have_a_digest(dtype):
    model = make_model("plain", dtype=dtype)
    assert (
        weights_digest(model)
        == weights_digest(copy.deepcopy(model))
        != weights_digest(make_model("plain", seed=1, dtype=dtype))
    )


def passes_at_full_width(monkeypatch, net):
    """Images that the dense model runs on while the list is made."""
    seen, original = [], marginal_effects.Reference._pass

    def watched(self, batch):
        if all(module.width == module.full_width and module.probe is None for module in self.elastic.values()):
            seen.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(marginal_effects.Reference, "_pass", watched)
    net.stratify(make_batches(dtype=torch.float64), plan=PLAN)
    monkeypatch.undo()
    return sum(seen)


def test_stratify_takes_the_answers_of_contract(monkeypatch):
    net = SuperNet(make_model("plain", dtype=torch.float64)).contract(make_batches(dtype=torch.float64))
    forgetful, changed = copy.deepcopy(net), copy.deepcopy(net)
    forgetful._dense_outputs = None
    changed.model.norm.bias.data.add_(1e-9)  # in float64: another digest, the same list
    assert passes_at_full_width(monkeypatch, net) == 0
    assert passes_at_full_width(monkeypatch, forgetful) == sum(len(images) for images, _ in make_batches())
    assert passes_at_full_width(monkeypatch, changed) == sum(len(images) for images, _ in make_batches())
    assert net.strata.entries == forgetful.strata.entries == changed.strata.entries
    assert torch.allclose(net.final_mean.vectors, forgetful.final_mean.vectors, atol=1e-5)
    assert net._dense_outputs is None


def test_a_change_between_contract_and_stratify_is_measured():
    """As if the answers of contract were not there."""
    lists = []
    for forget in (False, True):
        net = SuperNet(make_model("plain", dtype=torch.float64)).contract(make_batches(dtype=torch.float64))
        net.model.head.weight.data.mul_(-3)
        if forget:
            net._dense_outputs = None
        lists.append(net.stratify(make_batches(dtype=torch.float64), plan=PLAN))
    assert lists[0].strata.entries == lists[1].strata.entries
    assert torch.equal(lists[0].final_mean.vectors, lists[1].final_mean.vectors)


def test_a_list_made_alone_asks_once_per_image(monkeypatch):
    net, asked, original = SuperNet(make_model("plain")).contract(make_batches()), [], marginal_effects.DenseOutputs.of

    def watched(self, images, compute):
        return original(self, images, lambda unknown: (asked.append(len(unknown)), compute(unknown))[1])

    monkeypatch.setattr(marginal_effects.DenseOutputs, "of", watched)
    net._dense_outputs = None
    net.stratify(make_batches(), plan=Walk(states=((0.7, 3), (0.5, 3)), images=6))
    assert sum(asked) == 12


def test_images_that_contract_did_not_see_are_computed():
    net = SuperNet(make_model("plain")).contract(make_batches())
    net.stratify([make_images(8, seed=3)], plan=Walk(states=((0.5, 1),), images=4))
    assert net.strata is not None


def test_which_images_were_seen():
    seen, keys = Seen(), keys_of(IMAGES)
    assert seen.share(keys) == 0
    seen.add(keys[:2])
    seen.add([])
    seen.add(keys[2:3])
    assert [seen.share(part) for part in (keys, keys[:3], keys[3:], keys[2:4], [])] == [0.5, 1, 0, 0.5, 0]
