"""Effects of a change of width against finite differences, and that probes leave nothing behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import change_weights, keyed, make_batches, make_images, make_model, make_net, relative_error

from stratavit import SuperNet
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.calibration.objectives import distance
from stratavit.dropout_list import marginal_effects
from stratavit.elastic.mlp import ElasticMlp
from stratavit.models.cost import site_macs
from stratavit.utils.model import temporarily

IMAGES = make_images(3, seed=9)


def reference_of(net, batches):
    return marginal_effects.Reference(net.model, net.sites, [keyed(images) for images in batches], DenseOutputs())


def wide_net(family="plain"):
    """In float64 and eval mode, calibrated."""
    net = SuperNet(make_model(family, dtype=torch.float64)).contract(make_batches(dtype=torch.float64)).eval()
    return net.requires_grad_(False)


CUT = {"blocks.0.attn": 8, "blocks.0.mlp": 30, "blocks.1.attn": 8, "blocks.1.mlp": 20}
ODD_CUT = {"blocks.0.attn": 8, "blocks.0.mlp": 25, "blocks.1.attn": 8, "blocks.1.mlp": 14}


class Interpolated(torch.nn.Module):
    """A site between its cut weights and those one step away, padded with zeros, by a share `eps` of the way.

    Written without probes: the stock layers' operations, at the larger of the two widths.
    """

    def __init__(self, module, width, other):
        super().__init__()
        self.module, self.width, self.other, self.eps = module, width, other, 0.0
        self.padded = max(width, other)

    def mixed(self, tensors):
        here, there = tensors
        return here + self.eps * (there - here)

    def padded_out(self, width):
        """Weight ``[C, H, padded]`` and bias ``[C]``."""
        module = self.module
        weight, bias = module.out.weight, module.out.bias
        if width < module.full_width:
            weight, bias = module.compensated_outs([width])[0]
        weight = weight.view(len(weight), module.heads, width)
        return F.pad(weight, (0, self.padded - width)), torch.zeros_like(weight[:, 0, 0]) if bias is None else bias

    def forward(self, x, **_):
        module, padded = self.module, self.padded
        outs = [self.padded_out(width) for width in (self.width, self.other)]
        weight, bias = self.mixed([out[0] for out in outs]).flatten(1), self.mixed([out[1] for out in outs])
        if isinstance(module, ElasticMlp):
            hidden = module.act(F.linear(x, module.fc1.weight, module.fc1.bias))[..., :padded]
            return F.linear(hidden, weight, bias)
        qkv = F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, module.heads, -1))[..., :padded]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        gate = self.mixed([(torch.arange(padded) < width).to(x) for width in (self.width, self.other)])
        scores = (q * gate) @ k.transpose(-2, -1) * module.full_width**-0.5
        return F.linear((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2), weight, bias)


def directional(net, site, cut, other, images, eps=1e-4):
    """d distance / d eps of moving one site towards another width, by central differences."""
    dense = net(images)
    block, _, leaf = site.name.rpartition(".")
    module = net.model.get_submodule(site.name)
    moving = Interpolated(module, cut[site.name], other)
    values = []
    with net.at(cut):
        setattr(net.model.get_submodule(block), leaf, moving)
        for moving.eps in (eps, -eps):
            values.append(float(marginal_effects.distance(net.model(images), dense, net.model.num_classes)))
    setattr(net.model.get_submodule(block), leaf, module)
    return (values[0] - values[1]) / (2 * eps)


@pytest.mark.parametrize(("family_name", "cut"), [("plain", CUT), ("no_bias", CUT), ("odd_widths", ODD_CUT)])
def test_effects_equal_finite_differences(family_name, cut, monkeypatch):
    """In float64, at a cut network: the fall per image and MAC, mean of one step up and one down."""

    def wide_distance(small, dense, classes):
        return F.kl_div(small.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)

    monkeypatch.setattr(marginal_effects, "distance", wide_distance)
    net = wide_net(family_name)
    images = IMAGES.double()
    found = reference_of(net, [images[:2], images[2:]]).effects(net.cost, cut)[0]
    for site in net.sites:
        width, falls = cut[site.name], []
        for other in marginal_effects.neighbours(site, width, net.cost):
            if other != width:
                macs = net.cost.site_macs(site, other) - net.cost.site_macs(site, width)
                falls.append(-directional(net, site, cut, other, images) / macs)
        assert found[site.name] == pytest.approx(sum(falls) / len(falls) / len(images), rel=1e-4)


def probing(net, probes):
    return temporarily("probe", {net.elastic[name]: probe for name, probe in probes.items()})


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize("share", [0.5, 1])
def test_a_probe_computes_what_the_network_does_however_far_it_is_padded(family, share, recovered):
    net = copy.deepcopy(make_net(family))
    if recovered:
        change_weights(net)
    cut = {site.name: site.steps[int((len(site.steps) - 1) * share)] for site in net.sites}
    with torch.no_grad():
        expected = net(IMAGES, cut)
        for stretch in (0, 1, 100):
            probes = {}
            for site in net.sites:
                index = min(site.steps.index(cut[site.name]) + stretch, len(site.steps) - 1)
                padded = site.steps[index]
                probes[site.name] = marginal_effects.make_probes(net.elastic[site.name], [cut[site.name]], padded)[0]
            with probing(net, probes):
                assert relative_error(net.model(IMAGES), expected) <= 1e-5


def test_neighbours_are_steps_that_cost_alike_and_stay_within_one_unit_and_full_width(family):
    net = make_net(family)
    largest = max(site_macs(site, site.steps[1], 1) for site in net.sites)
    for site in net.sites:
        for width in site.steps[1:]:
            below, above = marginal_effects.neighbours(site, width, net.cost)
            assert site.steps[1] <= below <= width <= above <= site.width
            assert below < width or width == site.steps[1]
            assert above > width or width == site.width
            if site.steps[1] < below and above < site.width:
                for step in (width - below, above - width):
                    assert site_macs(site, step, 1) == pytest.approx(largest, rel=0.55)


def test_distance_of_logits_and_of_features():
    small, dense = torch.randn(2, 4, 7)
    p, q = dense.softmax(-1), small.softmax(-1)
    assert float(distance(small, dense, 7)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    expected = ((small - dense).norm(dim=-1) / dense.norm(dim=-1)).square().sum()
    assert float(distance(small, dense, 0)) == pytest.approx(float(expected), rel=1e-4)
    for classes in (0, 7):
        assert float(distance(dense, dense, classes)) == pytest.approx(0, abs=1e-6)
        assert distance(small.half(), dense.half(), classes).dtype == torch.float32


def test_drift_is_the_difference_of_what_the_heads_of_extracted_models_read(family):
    net = copy.deepcopy(make_net(family))
    cut = {site.name: site.steps[len(site.steps) // 2] for site in net.sites}
    small, dense = net.extract(spec=cut), net.extract(spec={})
    with torch.no_grad():
        means = [
            model.forward_head(model.forward_features(IMAGES), pre_logits=True).double().mean(dim=0)
            for model in (dense, small)
        ]
    reference = reference_of(net, IMAGES.split([1, 2]))
    found = reference.measure(cut)
    assert found.drift.dtype == torch.float64
    assert relative_error(found.drift, means[0] - means[1]) <= 1e-4
    assert found.distance == reference.distance(cut)
    net.requires_grad_(False)
    _, beside = reference.effects(net.cost, cut)  # of the same pass as the gradients
    assert beside.distance == pytest.approx(found.distance, rel=1e-4)
    assert relative_error(beside.drift, found.drift) <= 1e-4
    assert all(module.width == module.full_width for module in net.elastic.values())
