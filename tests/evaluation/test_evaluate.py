"""Accuracy and loss on logits that are known."""

import math

import pytest
import torch
from helpers import CLASSES, make_batches, make_images, make_model, make_net
from torch import nn

from stratavit import Metrics, StrataViTError, SuperNet, evaluate


class Table(nn.Module):
    """The logits of image i are row i of a table; the image's first pixel holds i."""

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


@pytest.mark.parametrize("sizes", [[4], [3, 1]])
def test_top1_top5_and_loss(sizes):
    """True classes 0, 4, 5, 6: one is first, two are among five; whatever the batch sizes."""
    found = evaluate(Table(RANKED), loader_of([0, 4, 5, 6], sizes))
    assert (found.top1, found.top5, found.n) == (25.0, 50.0, 4)
    normaliser = math.log(sum(math.exp(x) for x in range(7)))
    assert found.loss == pytest.approx(sum(normaliser - (6 - label) for label in (0, 4, 5, 6)) / 4, rel=1e-5)


def test_with_fewer_than_five_classes_the_true_one_is_among_five():
    found = evaluate(Table([[0.0, 1, 2]] * 3), loader_of([0, 1, 2], [3]))
    assert (found.top1, found.top5) == (pytest.approx(100 / 3), 100.0)


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


def test_a_super_network_or_a_wrapped_model_scores_as_its_source(batches):
    source = make_model("plain")
    assert (
        evaluate(SuperNet(source), batches) == evaluate(nn.DataParallel(source), batches) == evaluate(source, batches)
    )


def test_images_are_cast_to_the_type_of_the_weights():
    found, expected = (evaluate(make_model("plain", dtype=d), make_batches()) for d in (torch.bfloat16, torch.float32))
    assert found.loss == pytest.approx(expected.loss, rel=0.05)


@pytest.mark.parametrize("wrap", [lambda model: model, SuperNet], ids=["source", "super-network"])
def test_modes_are_left_as_they_were(batches, wrap):
    """As when somebody trains with part of the model frozen."""
    model = wrap(make_model("plain").train())
    for module in list(model.modules())[:9]:
        module.training = False
    before = [module.training for module in model.modules()]
    evaluate(model, batches)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no images"),
        ([make_images(2)], "no labels"),
        ([(make_images(1), torch.tensor([CLASSES]))], f"labels: found {CLASSES}.*{CLASSES} classes"),
        ([(torch.zeros(2, 3), torch.zeros(2))], "expected images"),
    ],
)
def test_bad_loaders_are_refused(loader, message):
    with pytest.raises(StrataViTError, match=message):
        evaluate(make_model("plain"), loader)


def test_a_model_that_outputs_nan_is_refused():
    with pytest.raises(StrataViTError, match="NaN"):
        evaluate(Table([[float("nan"), 0.0]]), loader_of([0], [1]))
