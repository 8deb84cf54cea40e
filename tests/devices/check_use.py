"""What is done with networks on a device that is not the CPU; images come from a loader on the CPU."""

import copy
from functools import cache

import pytest
import torch
from helpers import make_batches, make_images, make_model, make_net, relative_error

import stratavit
from stratavit import Setting
from stratavit.evaluation.features import features

IMAGES = make_images(4, seed=9)


@cache
def made(device):
    """A network with a list, made on the CPU and moved, which no check may change."""
    return copy.deepcopy(make_net("plain", stratified=True)).to(device)


@pytest.fixture
def net(device):
    return copy.deepcopy(made(device))


def there():
    return make_net("plain", stratified=True)


def test_accuracy(net):
    spec = net.spec(macs=0.6)
    for one, other, at in ((net, there(), spec), (net.extract(macs=0.6, verbose=False), there(), spec)):
        found = stratavit.evaluate(one, make_batches(), at if one is net else None)
        expected = stratavit.evaluate(other, make_batches(), at)
        assert (found.top1, found.top5, found.n) == (expected.top1, expected.top5, expected.n)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_curve(net):
    ladder = ("1", "75%", "0.5")
    found, expected = (stratavit.curve(one, make_batches(), ladder) for one in (net, there()))
    assert [(one.macs, one.top1) for one in found] == [(one.macs, one.top1) for one in expected]
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=1e-4)


@torch.no_grad()
def test_features(net):
    small = net.extract(macs=0.6, verbose=False)
    found = features(small, IMAGES)
    assert found.device == net.model.head.weight.device
    assert relative_error(found.cpu(), features(copy.deepcopy(small).cpu(), IMAGES)) <= 1e-4


@pytest.mark.parametrize("measure", [stratavit.knn, stratavit.linear_probe])
def test_classes_by_features(measure, net):
    spec = net.spec(macs=0.6)
    found, expected = (measure(one, make_batches(), make_batches((4, 4)), spec) for one in (net, there()))
    assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-3)


def test_zero_shot(net):
    embeddings = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    found, expected = (stratavit.zero_shot(one, embeddings, make_batches()) for one in (net, there()))
    assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-3)


def test_agreement_with_the_source(net, device):
    source = make_model("plain").to(device)
    spec = net.spec(macs=0.6)
    found = stratavit.compare_outputs(net, source, make_batches(), spec)
    expected = stratavit.compare_outputs(there(), make_model("plain"), make_batches(), spec)
    assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-3)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_export(format, net, device, tmp_path):
    small = net.extract(macs=0.6, verbose=False)
    parity = stratavit.export(small, tmp_path / {"onnx": "model.onnx", "torch": "model.pt2"}[format], format)
    assert parity.difference <= 1e-4
    assert {tensor.device for tensor in small.state_dict().values()} == {device}


def test_a_small_model_is_timed(net, device):
    models = {"dense": make_model("plain").to(device), "small": net.extract(macs=0.6, verbose=False)}
    rows = stratavit.bench(models, (3, 32, 32), [Setting(seconds=0.05)])
    assert [row.model for row in rows] == ["dense", "small"]


def test_a_budget_of_latency_and_accuracy(net, device):
    small = net.extract(latency_ms="90%", setting=Setting(seconds=0.05), verbose=False)
    assert small.head.weight.device == device
    assert net.spec(max_drop=100, data=make_batches()) is not None


def test_gradients_after_an_evaluation(net, device):
    """Second moments and the final mean came to the device in inference mode."""
    spec, other = net.spec(macs=0.6), copy.deepcopy(there())
    stratavit.evaluate(net, make_batches(), spec)
    net(IMAGES.to(device), spec).sum().backward()
    other(IMAGES, spec).sum().backward()
    for (name, one), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        assert relative_error(one.grad.cpu(), expected.grad) <= 1e-3, name
