"""Sensitivity of a module, against a slow reference that replaces the module by the zero function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, make_batches, make_images, make_model
from torch import nn

from stratavit import StrataViTError, SuperNet
from stratavit.dropout_list.sensitivity import COST_FLOOR, Tally, _above_chance, bypass_sensitivity


class Zero(nn.Module):
    def forward(self, x, **kwargs):
        return torch.zeros_like(x)


def slow_reference(source, loader):
    """Correct answers and cost of the model and of every bypass: ``(number, sum)`` under '' and each site."""
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


def answers(source, loader, wrong=0):
    """The same images labelled with the model's own answers, the first `wrong` of each batch changed."""
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


def test_top1_equals_the_slow_reference(source, batches):
    loader = answers(source, batches, wrong=1)
    expected = top1_sensitivity(slow_reference(source, loader))
    assert measure(source, loader, "top1") == pytest.approx(expected)
    assert max(expected.values()) > 0.1  # the reference has something to say


def test_cost_equals_the_slow_reference(source, batches):
    loader = answers(source, batches, wrong=1)
    expected = cost_sensitivity(slow_reference(source, loader))
    assert measure(source, loader, "cost") == pytest.approx(expected, rel=1e-4)
    assert len(set(expected.values())) > 1


def test_without_labels_the_models_own_answers_take_their_place(source, batches):
    bare = [images for images, _ in batches]
    reference = slow_reference(source, answers(source, batches))
    assert measure(source, bare, "top1") == pytest.approx(top1_sensitivity(reference))
    assert measure(source, bare, "cost") == pytest.approx(cost_sensitivity(reference), rel=1e-4)


def test_auto_takes_top1_above_chance_and_cost_at_chance(batches):
    source = make_model("plain")
    good, bad = answers(source, batches), answers(source, batches, wrong=9)
    assert measure(source, good, "auto") == measure(source, good, "top1") != measure(source, good, "cost")
    assert measure(source, bad, "auto") == measure(source, bad, "cost") != measure(source, bad, "top1")


def test_chance_is_left_by_three_standard_errors():
    """900 images, 9 classes: chance is 100 correct, and the limit lies at 100 + 3 * 10."""
    assert not _above_chance(Tally(images=900, classes=9, correct=130))
    assert _above_chance(Tally(images=900, classes=9, correct=131))


def test_a_module_that_does_not_help_gets_the_floor(batches):
    """A module that adds nothing loses nothing when bypassed; its sensitivity stays positive."""
    source = make_model("plain")
    with torch.no_grad():
        for parameter in source.blocks[0].mlp.fc2.parameters():
            parameter.zero_()
    assert measure(source, answers(source, batches), "top1")["blocks.0.mlp"] == pytest.approx(0.5 / 12)
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


def test_bad_input_is_one_clear_sentence():
    net = SuperNet(make_model("plain"))
    with pytest.raises(StrataViTError, match="measure: expected 'auto', 'top1' or 'cost', got 'loss'"):
        bypass_sensitivity(net.model, net.sites, make_batches(), "loss")
    used_up = iter(())
    with pytest.raises(StrataViTError, match=r"no images.*generator"):
        bypass_sensitivity(net.model, net.sites, used_up)
