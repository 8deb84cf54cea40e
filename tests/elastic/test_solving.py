"""Systems of one shape that are solved in one call, as on a GPU, against each solved alone, as on a CPU."""

import copy

import pytest
import torch
from helpers import PLAN, keyed, make_batches, make_images, make_net
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import BlockingCopies, on_fake_cuda, reads

from stratavit import SuperNet
from stratavit.calibration.dense_outputs import DenseOutputs
from stratavit.dropout_list import marginal_effects
from stratavit.elastic import base, solving
from stratavit.elastic.compensation import System, solve, solve_together
from stratavit.utils.devices import queues_work

IMAGES = make_images(2, seed=9)
ODD = {"blocks.0.attn": 8, "blocks.0.mlp": 30, "blocks.1.attn": 8, "blocks.1.mlp": 20}
FULL = {"blocks.0.attn": 16, "blocks.0.mlp": 30, "blocks.1.attn": 8, "blocks.1.mlp": 30}


@pytest.fixture
def stacks(monkeypatch):
    """Numbers of systems of each call, which are stacked wherever they are."""
    made = []
    monkeypatch.setattr(solving, "queues_work", lambda device: True)
    monkeypatch.setattr(solving, "solve_together", lambda systems: made.append(len(systems)) or solve_together(systems))
    return made


def test_one_function_decides_by_the_device():
    assert not queues_work(torch.device("cpu"))
    assert queues_work(torch.device("cuda", 0))
    net = make_net("plain")
    assert solving.solved_alike({module: [8] for module in net.elastic.values()}) == {}


@pytest.mark.parametrize(("outputs", "keep"), [(5, 1), (3, 40), (64, 65)])
def test_solutions_of_stacked_systems_in_float64(outputs, keep):
    generator = torch.Generator().manual_seed(keep)
    eye = torch.eye(keep, dtype=torch.float64)
    normal = {"generator": generator, "dtype": torch.float64}
    factors = [eye + 0.1 * torch.randn(keep, keep, **normal).tril() for _ in range(4)]
    factors[1] = 1e-3 * factors[1]  # of nearly constant channels
    systems = [System(factor, torch.randn(outputs, keep, **normal)) for factor in factors]
    for system, found in zip(systems, solve_together(systems), strict=True):
        torch.testing.assert_close(found, solve(system), rtol=1e-10, atol=0)
        torch.testing.assert_close(found @ system.factor, system.projected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["plain", "no_bias", "odd_widths"])
@pytest.mark.parametrize("limit", [1, 2**29])
def test_weights_of_modules_solved_together_equal_those_of_each(family, limit, stacks, monkeypatch):
    monkeypatch.setattr(solving, "STACKED_BYTES", limit)
    net = copy.deepcopy(make_net(family))
    asked = {module: [max(1, module.full_width // 2), module.full_width, 4] for module in net.elastic.values()}
    solved = solving.solved_alike(asked)
    assert stacks == ([1] * 8 if limit == 1 else [2] * 4)  # two modules of each kind
    with torch.no_grad():
        for module, widths in asked.items():
            together, alone = module.outs_at(widths, solved[module]), module.outs_at(widths)
            for ours, theirs in zip(together, alone, strict=True):
                for found, expected in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spec", "expected"), [(ODD, [2, 1, 1]), (FULL, [1, 2]), ({}, [])])
def test_only_what_is_solved_at_one_shape_is_stacked(spec, expected, stacks):
    net = copy.deepcopy(make_net("plain"))
    found = net.eval()(IMAGES, spec)
    with net.at(spec, fixed=True) as model, torch.no_grad():
        together = model(IMAGES)
    assert sorted(stacks) == sorted(expected)
    torch.testing.assert_close(together, found, rtol=1e-5, atol=1e-5)


def effects(net, widths):
    reference = marginal_effects.Reference(net.model, net.sites, [keyed(IMAGES)], DenseOutputs())
    return reference.effects(net.cost, widths)[0]


def steps_of_list(net):
    """Of a list that is measured anew."""
    again = SuperNet(net.extract(spec={}, verbose=False)).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    return [(entry.site, entry.width) for entry in again.strata.entries]


@pytest.mark.parametrize("family", ["plain", "layer_scale"])
def test_effects_and_list_are_the_same_from_stacked_systems(family, stacks, monkeypatch):
    net = copy.deepcopy(make_net(family)).eval().requires_grad_(False)
    together = effects(net, ODD)
    assert max(stacks) > 1
    list_together = steps_of_list(net)
    stacks.clear()
    monkeypatch.setattr(solving, "queues_work", lambda device: False)
    alone = effects(net, ODD)
    list_alone = steps_of_list(net)
    assert stacks == []
    assert together == pytest.approx(alone, rel=1e-4)
    assert list_together == list_alone


def test_a_step_of_the_list_reads_once_from_the_device(stacks, monkeypatch):
    """Whatever the number of modules; what keeps products on a CPU compares them, and is not there on a device."""
    monkeypatch.setattr(base, "can_be_kept", lambda weight: False)
    net = copy.deepcopy(make_net("plain")).eval().requires_grad_(False)
    reference = marginal_effects.Reference(net.model, net.sites, [keyed(IMAGES)], DenseOutputs())
    with reads(monkeypatch) as found:
        reference.effects(net.cost, ODD)
        assert found == ["tolist"]  # all effects, and the distance
        found.clear()
        reference.measure(ODD)
        assert found == ["aten._local_scalar_dense.default"]  # the distance
        float(IMAGES.sum())
        assert len(found) == 2


def test_on_cuda_systems_are_stacked_and_nothing_waits():
    """On tensors without data, which refuse whatever reads one."""
    net = copy.deepcopy(make_net("plain")).requires_grad_(False)
    spec = net.resolve(ODD)
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        asked = {module: [spec[name], 4] for name, module in on_fake_cuda(net).elastic.items()}
        solved = solving.solved_alike(asked)
        assert solved.keys() == asked.keys()
        for module, widths in asked.items():
            for weight, bias in module.outs_at(widths, solved[module]):
                assert weight.device.type == bias.device.type == "cuda"
        with net.at(ODD, fixed=True) as model:
            assert model(torch.empty(2, 3, 32, 32, device="cuda")).shape == (2, 7)
    assert copies.found == []
