"""The product that widths share is computed once, never used for other weights or moments, and counted."""

import copy
import pickle

import pytest
import torch
from helpers import make_images, make_net, tensors_of
from torch.func import functional_call

from stratavit.elastic import projected
from stratavit.elastic.compensation import project

IMAGES = make_images(2, seed=5)
HALF, THIRD = {"blocks.0.attn": 8, "blocks.1.mlp": 30}, {"blocks.0.attn": 5, "blocks.1.mlp": 20}


def small_weights(net, spec=HALF):
    return net.extract(spec=spec, verbose=False).state_dict()


def fresh(net):
    """A copy, which has nothing that was computed before."""
    found = copy.deepcopy(net)
    assert all(module.projected is None for module in found.elastic.values())
    return found


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor is None and theirs[name] is None) or torch.equal(tensor, theirs[name]), name


@pytest.fixture
def products(monkeypatch):
    """Widths of the products that are computed."""
    made = []
    monkeypatch.setattr(projected, "project", lambda *args: made.append(args[2]) or project(*args))
    return made


def test_one_product_serves_all_sizes_bit_by_bit(products):
    net = fresh(make_net("plain"))
    expected = [small_weights(fresh(net), spec) for spec in (HALF, THIRD)]
    products.clear()
    for spec, weights in ((HALF, expected[0]), (THIRD, expected[1]), (HALF, expected[0])):
        assert_equal(small_weights(net, spec), weights)
    assert len(products) == len(HALF)


@pytest.mark.parametrize("family", ["plain", "no_bias"])
def test_weights_of_training_are_those_that_are_extracted_bit_by_bit(family):
    net = fresh(make_net(family)).requires_grad_(True)
    for module in net.elastic.values():
        width = module.full_width // 2
        learning = module.weights_at(width)
        assert learning.out_weight.requires_grad
        assert module.projected is None  # a product that has a gradient is not kept
        with torch.no_grad():
            for _ in range(2):
                assert_equal(module.weights_at(width)._asdict(), learning._asdict())
        with torch.inference_mode():
            assert_equal(module.weights_at(width)._asdict(), learning._asdict())


CHANGES = {
    "in place": lambda module: module.out.weight.mul_(1.1),
    "by data in place": lambda module: module.out.weight.data.mul_(1.1),
    "by other data": lambda module: setattr(module.out.weight, "data", module.out.weight.data * 1.1),
    "columns swapped by data": lambda module: module.out.weight.data.copy_(module.out.weight.data.flip(1)),
    "another parameter": lambda module: setattr(module.out, "weight", torch.nn.Parameter(module.out.weight * 1.1)),
    "moments in place": lambda module: module.moments.factor.mul_(1.1),
    "cast": lambda module: module.half(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_product_of_other_weights_is_never_used(change, products):
    net = fresh(make_net("plain"))
    before = small_weights(net)
    assert products
    for module in net.elastic.values():
        CHANGES[change](module)
    if change == "cast":
        net.half()
    after = small_weights(net)
    assert_equal(after, small_weights(fresh(net)))
    assert not torch.equal(after["blocks.1.mlp.fc2.weight"].float(), before["blocks.1.mlp.fc2.weight"])


def test_gradients_of_functions_equal_the_others_after_a_product_was_kept():
    net, name = fresh(make_net("plain")), "model.blocks.1.mlp.fc2.weight"
    small_weights(net)
    parameters = dict(net.named_parameters())

    def loss(weight):
        return functional_call(net, {name: weight}, (IMAGES, HALF)).square().sum()

    loss(parameters[name]).backward()
    given = parameters[name].detach().clone()
    expected, _ = torch.func.grad(loss)(given), net(IMAGES, HALF)
    torch.testing.assert_close(expected, parameters[name].grad)
    with torch.no_grad():  # the weight is differentiated, whatever the mode outside
        torch.testing.assert_close(torch.func.vjp(loss, given)[1](torch.ones(()))[0], expected)
    _, slope = torch.func.jvp(loss, (given,), (expected,))
    torch.testing.assert_close(slope, expected.square().sum(), rtol=1e-3, atol=0)


def test_a_product_made_in_inference_mode_lets_gradients_reach_images():
    net = fresh(make_net("plain")).requires_grad_(False)
    with torch.inference_mode():
        expected = net(IMAGES, HALF).clone()
    assert any(module.projected is not None for module in net.elastic.values())
    images = IMAGES.clone().requires_grad_(True)
    found = net(images, HALF)
    assert torch.equal(found.detach(), expected)
    found.sum().backward()
    assert images.grad.any()


def test_what_is_kept_is_counted_released_and_in_no_copy_or_file(tmp_path):
    net = fresh(make_net("plain"))
    without, held = net.memory(), sum(tensors_of(net).values())
    small_weights(net)
    assert net.memory().projected == sum(tensors_of(net).values()) - held > 0
    assert net.memory().total == without.total + net.memory().projected
    assert pickle.loads(pickle.dumps(net)).memory() == copy.deepcopy(net).memory() == without
    files = [tmp_path / name for name in ("with", "without")]
    net.save(files[0])
    net.forget_moments()
    assert net.memory().projected == 0
    fresh(make_net("plain")).save(files[1])
    assert (files[0] / "moments.safetensors").read_bytes() == (files[1] / "moments.safetensors").read_bytes()
    served = fresh(make_net("plain"))
    small_weights(served)
    assert served.specialise(HALF).projected == 0
