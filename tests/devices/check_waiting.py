"""How often a program waits for a device that is not the CPU."""

import copy
import warnings
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from check_conversion import IMAGES, NAMES, converted, made
from helpers import FAMILIES, enliven, make_batches
from second_device import reads, uploads, waiting_refused
from timm.models.vision_transformer import VisionTransformer

import stratavit
from stratavit import SuperNet
from stratavit.calibration import contraction
from stratavit.calibration.statistics import observe


@contextmanager
def no_waiting(device, uploads_too=True):
    """Inside, waiting for the device is an error; the traceback says where."""
    if device.type != "cuda":
        with waiting_refused(uploads_too):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed(device):
    x = torch.randn(3)
    with no_waiting(device):
        y = torch.ones(3, device=device)[1:] + 1
    for wait in (y.sum().item, y.cpu, y.tolist, y.nonzero, lambda: x.to(device), lambda: y[y > 0], lambda: y[[0, 1]]):
        with pytest.raises(RuntimeError, match=r"wait|synchron"), no_waiting(device):
            wait()


UPLOADS = "vit_small_patch16_dinov3"  # timm makes its positions on the CPU in every pass


@pytest.fixture(params=["plain", "merging", "specialised", *(name for name in NAMES if name != UPLOADS)])
def running(request, device):
    """A network that has run at every spec of these: what is no buffer has come to the device. And the specs."""
    net = copy.deepcopy(network(request.param, device))
    specs = [{}, net.spec(macs=0.75), {site.name: site.width // 2 for site in net.sites}]
    if request.param == "specialised":
        net.specialise(*specs, moments=True)
    if request.param == "merging":
        specs.append(net.spec(macs=0.5, axes="both"))
    for spec in specs:
        net(IMAGES.to(device), spec)
    return net, specs


@cache
def network(name, device):
    if name == "merging":
        return converted("plain", device, axes=("width", "tokens"))
    return made("plain" if name == "specialised" else name, device)


def test_a_pass_waits_for_nothing(running, device):
    (net, specs), images = running, IMAGES.to(device)
    with no_waiting(device), torch.no_grad():
        for spec in specs:
            net(images, spec)


def test_a_step_waits_for_nothing(running, device):
    (net, specs), images = running, IMAGES.to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with no_waiting(device):
        for spec in specs:
            net(images, spec).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_extraction_waits_for_nothing(running, device):
    net, specs = running
    for spec in specs:
        with no_waiting(device):
            net.extract(spec=spec, verbose=False)


@contextmanager
def counted_waits(device, uploads_too=True):
    """How often the program waits inside; only on CUDA are copies queued, so that elsewhere they may be left out."""
    found = []
    if device.type != "cuda":
        before = reads() + uploads() * uploads_too
        yield found
        found += [None] * (reads() + uploads() * uploads_too - before)
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield found
        found += [one for one in warned if "synchronizing" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_of_an_evaluation_is_read_once(device):
    """And images and labels go there."""
    net, counts = made("plain", device), []
    for sizes in ((12,), (6, 6), (2,) * 6):  # with the first, what is no buffer comes to the device
        with counted_waits(device) as found:
            stratavit.evaluate(net, make_batches(sizes), net.spec(macs=0.75))
        counts.append(len(found))
    assert counts[2] - counts[1] == 3 * 4


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


@pytest.mark.parametrize("work", ["contract", "stratify"])
def test_calibration_waits_for_no_batch(work, device):
    """Images go there, and nothing comes back before all have run."""
    counts = []
    for sizes in ((6, 6), (2,) * 6):
        net = copy.deepcopy(made("plain", device))
        with counted_waits(device, uploads_too=False) as found:
            getattr(net, work)(make_batches(sizes))
        counts.append(len(found))
    assert counts[0] == counts[1] > 0
