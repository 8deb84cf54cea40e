"""Accuracy and loss on logits made by hand."""

import math

import pytest
import torch
from helpers import CLASSES, make_batches, make_images, make_model, make_net
from torch import nn

import stratavit
from stratavit import Metrics, StrataViTError, SuperNet, evaluate


class Table(nn.Module):
    """Answers image i with row i of a table; the image's first pixel holds i."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, images):
        assert not self.training
        return self.logits[images[:, 0, 0, 0].long()]


def loader_of(labels, sizes):
    images = torch.arange(len(labels)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return list(zip(images.split(sizes), torch.tensor(labels).split(sizes), strict=True))


RANKED = [[6.0, 5, 4, 3, 2, 1, 0]] * 4  # class 0 comes first, class 4 is the last of five


@pytest.mark.parametrize("sizes", [[4], [3, 1], [1, 1, 1, 1]])
def test_top1_top5_and_loss_by_hand(sizes):
    """True classes 0, 4, 5, 6: one is first, two are among five; whatever the batch sizes."""
    found = evaluate(Table(RANKED), loader_of([0, 4, 5, 6], sizes))
    assert (found.top1, found.top5, found.n) == (25.0, 50.0, 4)
    normaliser = math.log(sum(math.exp(x) for x in range(7)))
    assert found.loss == pytest.approx(sum(normaliser - (6 - label) for label in (0, 4, 5, 6)) / 4, rel=1e-5)


def test_with_fewer_than_five_classes_every_answer_is_among_them():
    found = evaluate(Table([[0.0, 1, 2]] * 3), loader_of([0, 1, 2], [3]))
    assert (found.top1, found.top5) == (pytest.approx(100 / 3), 100.0)


def test_a_sure_and_wrong_answer_costs_its_margin():
    assert evaluate(Table([[0.0, 50.0]]), loader_of([0], [1])).loss == pytest.approx(50.0)


def test_metrics_as_numbers_and_text():
    metrics = Metrics(79.68, 95.0, 0.98765, 433)
    assert metrics.to_dict() == {"top1": 79.68, "top5": 95.0, "loss": 0.98765, "n": 433}
    assert str(metrics) == "top-1 79.68 %, top-5 95.00 %, loss 0.9877 over 433 images"


def test_a_spec_runs_that_sub_network(batches):
    net = make_net("plain")
    spec = {"blocks.0.mlp": 3, "blocks.1.attn": 0}
    found, expected = evaluate(net, batches, spec=spec), evaluate(net.extract(spec=spec), batches)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.top1, found.n) == (expected.top1, 12)
    assert found.loss != pytest.approx(evaluate(net, batches).loss, rel=1e-3)


def test_super_network_at_full_size_scores_as_its_source(source, batches):
    assert evaluate(SuperNet(source), batches) == evaluate(source, batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_take_the_type_of_the_weights(dtype):
    found, expected = (evaluate(make_model("plain", dtype=d), make_batches()) for d in (dtype, torch.float32))
    assert found.loss == pytest.approx(expected.loss, rel=0.05)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, SuperNet], ids=["source", "super-network"])
def test_modes_are_left_as_they_were(batches, wrap, training):
    model = wrap(make_model("plain").train(training))
    before = modes(model)
    evaluate(model, batches)
    assert modes(model) == before


def test_modes_are_left_as_they_were_also_where_only_a_part_is_training(batches):
    """As when somebody trains with part of the model frozen."""
    model = make_model("plain").train()
    model.blocks[0].eval()
    before = modes(model)
    evaluate(model, batches)
    assert modes(model) == before


def test_evaluation_does_not_switch_dropout_on(batches, images):
    source = make_model("plain")
    for block in source.blocks:
        block.mlp.drop1.p = 0.5
    net = SuperNet(source)
    expected = net(images)
    assert torch.equal(net(images), expected)
    evaluate(net, batches)
    assert torch.equal(net(images), expected)


BAD = {
    "no images": ([], "no images"),
    "no labels": ([make_images(2)], "no labels"),
    "label outside": ([(make_images(1), torch.tensor([CLASSES]))], f"found {CLASSES}.*{CLASSES} classes.*class map"),
    "not images": ([(torch.zeros(2, 3), torch.zeros(2))], "expected images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_loaders_are_refused(case):
    loader, words = BAD[case]
    with pytest.raises(StrataViTError, match=words):
        stratavit.evaluate(make_model("plain"), loader)
