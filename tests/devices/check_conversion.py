"""Conversion on a device that is not the CPU, with images from a loader on the CPU; run by test_other_device.py."""

import copy
import pickle
from functools import cache

import architectures
import pytest
import torch
from helpers import PLAN, change_weights, make_batches, make_images, make_model, relative_error
from torch.utils.data import DataLoader, TensorDataset

import stratavit
from stratavit import Setting, SuperNet
from stratavit.interop.timm_equivalent import tensor_of

IMAGES = make_images(4, seed=9)
FAMILIES = ("plain", "registers", "distilled", "whole heads")  # of `helpers`
NAMES = (  # of `architectures`
    "vit_small_patch16_dinov3",  # rotary
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "vit_giant_patch14_dinov2",  # a gated MLP
    "twins_svt_small",  # compensated by means
)
OTHERS = ("ViTForImageClassification", "SwinForImageClassification", architectures.TORCHVISION)  # of other libraries
OPTIONS = {"paper": {"method": "paper"}, "sums on the host": {"memory": "host"}}


@cache
def source(name):
    if name in NAMES + OTHERS:
        return architectures.make(name)
    return make_model(name if name != "whole heads" else "plain")


def converted(name, device, options=None, **more):
    """A super-network with a list, made where its model is."""
    net = SuperNet(copy.deepcopy(source(name)).to(device), whole_heads=name == "whole heads")
    net.contract(make_batches(), **(options or {}))
    more |= {} if net.method == "paper" else {"plan": PLAN}
    return net.stratify(make_batches(), **more).eval()


@cache
def made(name, device):
    """The same, which no check may change."""
    return converted(name, device)


def check_place(model, device):
    """Weights and buffers are on the device."""
    assert {tensor.device for tensor in model.state_dict().values()} == {device}
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {device}


@torch.no_grad()
def check_net(net, name, device, **budget):
    """It computes the source's function, on the device; small models do what its prefixes do."""
    check_place(net, device)
    images = IMAGES.to(device)
    assert relative_error(net(images).cpu(), tensor_of(source(name)(IMAGES))) <= 1e-4
    small = net.extract(verbose=False, **budget or {"macs": 0.75})
    check_place(small, device)
    assert relative_error(tensor_of(small(images)), net(images, small.provenance["spec"])) <= 1e-5
    return small


@pytest.mark.parametrize("name", [*FAMILIES, *NAMES, *OTHERS])
def test_a_conversion(name, device):
    """It is that of the CPU, but for rounding, which may decide between two entries of the list."""
    net, there = made(name, device), made(name, torch.device("cpu"))
    small = check_net(net, name, device)
    assert small.provenance["macs"] == pytest.approx(there.macs(there.spec(macs=0.75)), abs=0.05 * net.macs())


def test_in_one_call(device):
    model, images = copy.deepcopy(source("plain")).to(device), DataLoader(TensorDataset(make_images(24)), 8)
    check_place(stratavit.compress(model, images, macs=0.75, verbose=False), device)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_conversion_in_another_way(option, device):
    check_net(converted("plain", device, OPTIONS[option]), "plain", device)


def test_a_list_over_both_axes(device):
    net = converted("plain", device, axes=("width", "tokens"))
    small = check_net(net, "plain", device, macs=0.5, axes="both")
    assert any(name.endswith("tokens") for name in small.provenance["spec"])


def test_a_list_by_latency(device):
    check_net(
        converted("plain", device, price="latency", setting=Setting(seconds=0.01), units="default"), "plain", device
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3"])
def test_files(name, device, tmp_path):
    """Bit for bit on the device that wrote them."""
    net, images = made(name, device), IMAGES.to(device)
    spec = net.spec(macs=0.6)
    small = net.extract(spec=spec, verbose=False)
    net.save(tmp_path / "net")
    stratavit.save(small, tmp_path / "small")
    for place in (device, torch.device("cpu")):
        loaded, small_loaded = SuperNet.load(tmp_path / "net", place), stratavit.load(tmp_path / "small", place)
        check_place(loaded, place)
        check_place(small_loaded, place)
        found = (loaded(images.to(place), spec), small_loaded(images.to(place)), loaded(images.to(place)))
        expected = (net(images, spec), small(images), net(images))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) if place == device else relative_error(one, other.cpu()) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_network_goes_from_device_to_device(memory, device):
    """Second moments and the final mean, which are no buffers, come along when they are used."""
    net, there = converted("plain", device, {"memory": memory}), torch.device("cpu")
    spec = net.spec(macs=0.6)
    expected = net(IMAGES.to(device), spec).cpu()
    for place in (there, device, there):
        net.to(place)
        check_place(net, place)
        assert relative_error(net(IMAGES.to(place), spec).cpu(), expected) <= 1e-4
        check_place(net.extract(spec=spec, verbose=False), place)
    assert net.final_mean.vectors.device == there


@torch.no_grad()
def test_what_recovery_of_all_sizes_has_learned(device, tmp_path):
    net = copy.deepcopy(made("plain", device))
    change_weights(net)
    small, images = check_net(net, "plain", device), IMAGES.to(device)
    net.save(tmp_path / "net")
    loaded = SuperNet.load(tmp_path / "net", device)
    assert torch.equal(loaded(images, small.provenance["spec"]), net(images, small.provenance["spec"]))


@torch.no_grad()
def test_specialised_sizes(device):
    net, images = copy.deepcopy(made("plain", device)), IMAGES.to(device)
    spec = net.spec(macs=0.6)
    expected = net(images, spec)
    net.specialise(spec)
    assert relative_error(net(images, spec), expected) <= 1e-5


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_on_the_device(how, device):
    net = made("plain", device)
    for one in (net, net.extract(macs=0.6, verbose=False)):
        other = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
        check_place(other, device)
        images = IMAGES.to(device)
        assert torch.equal(other(images), one(images))
        if one is net:
            spec = net.spec(macs=0.6)
            assert torch.equal(other(images, spec), net(images, spec))


def test_half_precision(device):
    net = copy.deepcopy(made("plain", device)).to(torch.bfloat16)
    spec, images = net.spec(macs=0.6), IMAGES.to(device, torch.bfloat16)
    check_place(net, device)
    with torch.no_grad():
        small = net.extract(spec=spec, verbose=False)
        assert relative_error(net(images).float().cpu(), source("plain")(IMAGES)) <= 0.1
        assert relative_error(small(images).float(), net(images, spec).float()) <= 0.05
