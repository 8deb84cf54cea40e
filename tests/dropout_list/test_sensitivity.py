"""Sensitivity of a module, against a slow reference that replaces the module by the zero function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, make_batches, make_images, make_model, make_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stratavit import StrataViTError, SuperNet
from stratavit.dropout_list.sensitivity import COST_FLOOR, bypass_sensitivity, unit_importance


class Zero(nn.Module):
    def forward(self, x, **kwargs):
        return torch.zeros_like(x)


def slow_reference(source, loader):
    """Correct predictions and cost of the model and of every bypass: ``(number, sum)`` under '' and each site."""
    found = {}
    names = [f"blocks.{i}.{part}" for i in range(len(source.blocks)) for part in ("attn", "mlp")]
    for name in ["", *names]:
        model = copy.deepcopy(source)
        if name:
            block, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(block), leaf, Zero())
        correct, cost = 0, 0.0
        for images, labels in loader:
            with torch.no_grad():
                logits = model(images)
            correct += int((logits.argmax(dim=-1) == labels).sum())
            cost += float(F.cross_entropy(logits, labels, reduction="sum"))
        found[name] = correct, cost
    return found


def predicted(source, loader, wrong=0):
    """The same images labelled with the model's own predictions, the first `wrong` of each batch changed."""
    labelled = []
    for images, _ in loader:
        with torch.no_grad():
            labels = source(images).argmax(dim=-1)
        labels[:wrong] = (labels[:wrong] + 1) % CLASSES
        labelled.append((images, labels))
    return labelled


def top1_sensitivity(reference):
    base = max(reference[""][0], 1)
    return {name: max(base - correct, 0.5) / base for name, (correct, _) in reference.items() if name}


def cost_sensitivity(reference):
    base = reference[""][1]
    return {name: max(cost / base - 1, COST_FLOOR) for name, (_, cost) in reference.items() if name}


def measure(source, loader, measure):
    net = SuperNet(source)
    return bypass_sensitivity(net.model, net.sites, loader, measure)


@pytest.mark.parametrize("labelled", [True, False])
def test_top1_and_cost_equal_the_slow_reference(source, batches, labelled):
    """Without labels the model's predictions take their place."""
    truth = predicted(source, batches, wrong=int(labelled))
    loader = truth if labelled else [images for images, _ in batches]
    reference = slow_reference(source, truth)
    expected = top1_sensitivity(reference)
    assert measure(source, loader, "top1") == pytest.approx(expected)
    assert max(expected.values()) > 0.1  # the reference has something to say
    expected = cost_sensitivity(reference)
    assert measure(source, loader, "cost") == pytest.approx(expected, rel=1e-4)
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize(("right", "taken", "other"), [(6, "top1", "cost"), (5, "cost", "top1")])
def test_auto_is_top1_beyond_three_standard_errors_of_chance(right, taken, other):
    """12 images, 7 classes: chance is 1.7 correct, and the limit lies at 1.7 + 3 * 1.3 = 5.6."""
    source = make_model("plain")
    loader = predicted(source, make_batches((12,)), wrong=12 - right)
    found = measure(source, loader, "auto")
    assert found == measure(source, loader, taken) != measure(source, loader, other)


def test_a_module_that_does_not_help_gets_the_floor(batches):
    """A module that adds nothing loses nothing when bypassed; its sensitivity stays positive."""
    source = make_model("plain")
    with torch.no_grad():
        for parameter in source.blocks[0].mlp.fc2.parameters():
            parameter.zero_()
    assert measure(source, predicted(source, batches), "top1")["blocks.0.mlp"] == pytest.approx(0.5 / 12)
    assert measure(source, batches, "cost")["blocks.0.mlp"] == COST_FLOOR


def test_measured_at_the_widths_that_are_set(batches):
    net = SuperNet(make_model("plain"))
    full = bypass_sensitivity(net.model, net.sites, batches, "cost")
    net.method = "paper"
    with net.at({"blocks.0.mlp": 0}):
        cut = bypass_sensitivity(net.model, net.sites, batches, "cost")
        assert net.elastic["blocks.0.mlp"].width == 0
    assert cut["blocks.0.mlp"] == COST_FLOOR  # nothing is left to bypass
    assert cut["blocks.1.attn"] != full["blocks.1.attn"]


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was_also_after_an_error(training, batches):
    net = SuperNet(make_model("plain"))
    net.model.train(training)
    bypass_sensitivity(net.model, net.sites, batches)
    with pytest.raises(StrataViTError, match="classes"):
        bypass_sensitivity(net.model, net.sites, [(make_images(1), torch.tensor([CLASSES]))])
    assert all(module.training == training for module in net.model.modules())
    assert not any(module.bypassed for module in net.elastic.values())


def test_bad_input_is_refused():
    net = SuperNet(make_model("plain"))
    with pytest.raises(StrataViTError, match="measure"):
        bypass_sensitivity(net.model, net.sites, make_batches(), "loss")
    with pytest.raises(StrataViTError, match=r"no images.*generator"):
        bypass_sensitivity(net.model, net.sites, iter(()))


# ---- importance of units -------------------------------------------------------------------------------------------


def test_importance_of_units_solved_on_paper():
    """16 coordinates in 2 units: 1/4 of the importance lies in the first."""
    site, alpha = make_net("plain").sites[0], [1.0] * 8 + [3.0] * 8
    assert unit_importance(site, alpha, gamma=2.0) == pytest.approx([0.5, 1.5])
    assert unit_importance(site, alpha[:8], gamma=2.0) == pytest.approx([2.0])  # only one unit is left
    assert unit_importance(site, [0.0] * 16, gamma=2.0) == [0.0, 0.0]


@given(st.lists(st.floats(0.01, 10), min_size=64, max_size=64), st.floats(0.01, 3))
def test_importance_of_a_module_sums_to_its_sensitivity(alpha, gamma):
    found = unit_importance(make_net("plain").sites[1], alpha, gamma)
    assert len(found) == 32
    assert sum(found) == pytest.approx(gamma)
