"""How often a program waits for a device that is not the CPU."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from helpers import FAMILIES, enliven, make_batches, make_images, make_net
from second_device import reads, uploads, waiting_refused
from timm.models.vision_transformer import VisionTransformer

from stratavit import SuperNet
from stratavit.calibration import contraction
from stratavit.calibration.statistics import observe


@contextmanager
def no_waiting(device):
    """Inside, waiting for the device is an error; the traceback says where."""
    if device.type != "cuda":
        with waiting_refused():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def net(device):
    net = copy.deepcopy(make_net("plain", stratified=True)).to(device)
    net(make_images(4).to(device), net.spec(macs=0.6))  # what is no buffer has come to the device
    return net


def test_waiting_is_noticed(device):
    x = torch.randn(3)
    with no_waiting(device):
        y = torch.ones(3, device=device)[1:] + 1
    for wait in (y.sum().item, y.cpu, y.tolist, y.nonzero, lambda: x.to(device), lambda: y[y > 0], lambda: y[[0, 1]]):
        with pytest.raises(RuntimeError, match=r"wait|synchron"), no_waiting(device):
            wait()


def test_a_pass_waits_for_nothing(net, device):
    images, spec = make_images(4).to(device), net.spec(macs=0.6)
    with no_waiting(device), torch.no_grad():
        for one in ({}, spec, dict.fromkeys(spec, 0)):
            net(images, one)


def test_a_step_waits_for_nothing(net, device):
    images, labels, spec = make_images(4).to(device), torch.arange(4).to(device), net.spec(macs=0.6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for compensation in ("full", "mean", "none"):
        net.compensation = compensation
        with no_waiting(device):
            torch.nn.functional.cross_entropy(net(images, spec), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_extraction_waits_for_nothing(net, device):
    spec = net.spec(macs=0.6)
    with no_waiting(device):
        net.extract(spec=spec, verbose=False)


@contextmanager
def counted_waits(device):
    """How often the program waits inside."""
    found = []
    if device.type != "cuda":
        before = reads() + uploads()
        yield found
        found += [None] * (reads() + uploads() - before)
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield found
        found += [one for one in warned if "synchronizing" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["plain", "layer_scale"])
def test_sorting_waits_as_often_however_many_blocks_there_are(family, device):
    counts = []
    for depth in (2, 4):
        shape = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
        net = SuperNet(enliven(VisionTransformer(**shape, depth=depth, **FAMILIES[family])).to(device))
        observers, _ = observe(net.model, make_batches(), "auto", "none", "test", 0.5)
        with counted_waits(device) as found:
            contraction.sort_sites(net.model, observers, "output")
        counts.append(len(found))
    assert counts[0] == counts[1] > 0
