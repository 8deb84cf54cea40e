"""The contract that every supported model keeps, whatever its family: function, sizes, prefixes, files, training."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import architectures
import pytest
import torch
from helpers import PLAN, enliven, make_images, relative_error

import stratavit
from stratavit import SuperNet
from stratavit.calibration.distance import distance
from stratavit.interop.equivalence import tensor_of
from stratavit.models.architecture import describe
from stratavit.models.cost import linear_macs
from stratavit.utils.model import classes_of

pytestmark = pytest.mark.parametrize("name", architectures.ALL)
LABELS = torch.arange(12) % 7
BATCHES = [(make_images(12)[:7], LABELS[:7]), (make_images(12)[7:], LABELS[7:])]
IMAGES = make_images(3, seed=9)


@cache
def source(name):
    return architectures.make(name)


@cache
def converted(name, method="default"):
    """A super-network with its list. Shared between tests: copy it before changing it."""
    net = SuperNet(source(name)).contract(BATCHES, method=method)
    return (net.stratify(BATCHES, plan=PLAN) if method == "default" else net.stratify(BATCHES)).eval()


def answer(model, *args):
    with torch.no_grad():
        return tensor_of(model(IMAGES, *args))


def specs(net):
    """Full size, along the list, and widths that no list would give."""
    length = len(net.strata)
    listed = [net.spec(position=length * part // 4) for part in range(5)]
    odd = {site.name: max(1, site.width // (2 + number % 3)) for number, site in enumerate(net.sites)}
    gone = {site.name: 0 for site in net.sites[: len(net.sites) // 2]}
    return [*listed, odd, gone, {net.sites[-1].name: 0}]


@pytest.mark.parametrize("method", ["default", "paper"])
def test_contraction_preserves_the_function(name, method):
    expected = answer(source(name))
    assert relative_error(answer(SuperNet(source(name))), expected) < 1e-5
    assert relative_error(answer(converted(name, method)), expected) < 2e-5


@pytest.mark.parametrize("method", ["default", "paper"])
def test_extracted_is_elastic_and_costs_what_was_said(name, method):
    net = converted(name, method)
    size, full = net.data_config["input_size"], answer(net)
    for spec in specs(net):
        small = net.extract(spec=spec)
        assert type(small) is type(source(name)) or name == architectures.TORCHVISION
        assert relative_error(answer(small) - answer(net, spec) + full, full) < 1e-5
        plain = stratavit.as_timm(small)
        for attention in (False, True):
            assert linear_macs(plain, size, attention=attention) == net.macs(spec, attention=attention)
        assert sum(parameter.numel() for parameter in plain.parameters()) == net.params(spec)


def test_dense_counts_are_those_of_the_source(name):
    net, plain = converted(name), stratavit.as_timm(source(name))
    for attention in (False, True):
        assert net.macs(attention=attention) == linear_macs(plain, net.data_config["input_size"], attention=attention)
    assert net.params() == sum(parameter.numel() for parameter in plain.parameters())


def test_prefixes_nest_and_budgets_are_met(name):
    net = converted(name)
    widths = [net.strata.spec(position) for position in range(len(net.strata) + 1)]
    costs = [net.macs(spec) for spec in widths]
    for larger, smaller in pairwise(widths):
        assert smaller <= larger
        assert smaller != larger
    assert costs == sorted(costs, reverse=True)
    assert all(width == 0 for width in widths[-1].values())
    dearest = max(before - after for before, after in pairwise(costs))
    lowest = costs[-1] / costs[0]
    for part in (0.9, 0.7, 0.3):
        share = lowest + part * (1 - lowest)
        met = net.budget(macs=share)
        assert 0 <= share * net.macs() - met.got < dearest


def test_saved_and_loaded_is_the_same(name, tmp_path):
    net = converted(name)
    spec = specs(net)[2]
    net.save(tmp_path / "net")
    loaded = SuperNet.load(tmp_path / "net").eval()
    assert torch.equal(answer(loaded, spec), answer(net, spec))
    assert loaded.origin == net.origin
    small = net.extract(spec=spec)
    stratavit.save(small, tmp_path / "small")
    back = stratavit.load(tmp_path / "small")
    assert type(back) is type(small)
    assert torch.equal(answer(back), answer(small))


def test_exported_to_onnx_answers_alike(name, tmp_path):
    net = converted(name)
    images = IMAGES if architectures.NAMES.get(name) is None else make_images(2, seed=3)
    parity = stratavit.export(net.extract(spec=specs(net)[2]), tmp_path / "small.onnx", images=images)
    assert parity.difference < 1e-4


def test_a_few_steps_of_piad_lower_the_loss(name):
    """On a toy task: which quarter of the image is brighter; features learn those of another model.

    Compared with a run of the same steps that learns nothing, so that list and means are the same.
    """
    pytest.importorskip("accelerate")
    images, labels = make_images(32, seed=5), torch.arange(32) % 4
    for number, label in enumerate(labels.tolist()):
        images[number, :, 16 * (label // 2) :, 16 * (label % 2) :] += 2
    data = torch.utils.data.TensorDataset(images, labels)
    headless = not classes_of(converted(name))
    recipe = {"epochs": 15, "list_epochs": 1, "batch_size": 16, "ema_decay": 0.0, "smoothing": 0.0, "mixup": 0.0}
    recipe |= {"cutmix": 0.0, "repeats": 1, "workers": 0, "tracker": "none", "drop_path": 0.0, "weight_decay": 0.0}
    teacher = enliven(copy.deepcopy(stratavit.as_timm(source(name))), seed=1) if headless else None
    target = labels if teacher is None else teacher(images).detach()

    def trained(lr):
        """Loss at three sizes."""
        net = copy.deepcopy(converted(name))
        changes = {"lr": lr, "min_lr": lr, "sampling": "sandwich"}
        stratavit.train_piad(net, data, config=recipe | changes, cpu=True, teacher=teacher)
        losses = []
        for position in (0, len(net.strata) // 2, len(net.strata)):
            with torch.no_grad():
                found = net(images, net.strata.spec(position))
            loss = distance(found, target, 0) if headless else torch.nn.functional.cross_entropy(found, target)
            losses.append(float(loss))
        return losses

    assert sum(trained(0.01)) < 0.9 * sum(trained(1e-9))


def test_the_description_is_of_the_source(name):
    net = converted(name)
    plain = stratavit.as_timm(source(name))
    assert {key: value for key, value in describe(plain).items() if key != "sites"} == {
        key: value for key, value in net.description.items() if key != "sites"
    }
