"""A linear probe in closed form against an independent solution, and agreement of outputs with those of the source."""

import architectures
import numpy as np
import pytest
import torch
from command_line import make_folder, output, refusal
from helpers import PLAN, make_batches, make_images, make_model, make_net

import stratavit
from stratavit import StrataViTError, SuperNet, compare_outputs, linear_probe
from stratavit.evaluation.features import features
from stratavit.evaluation.probe import RIDGES, fitted

MAPS = ("vit_small_patch14_reg4_dinov2.maps", "swin_tiny_patch4_window7_224.maps")
NONE = torch.zeros(40, dtype=torch.bool)


def drawn(n=40, width=6, classes=3):
    """Features around a point for each class, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_solution_is_that_of_centred_ridge_regression(ridge):
    """An intercept that is not shrunk is the same as centring features and targets."""
    x, labels = drawn()
    weights = fitted(x, labels, NONE, ridge)
    a, y = x.double().numpy(), np.eye(3)[labels.numpy()]
    centred, target = a - a.mean(0), y - y.mean(0)
    strength = ridge * np.mean(np.var(a, axis=0)) * len(a)
    slope = np.linalg.lstsq(
        np.vstack([centred, np.sqrt(strength) * np.eye(6)]), np.vstack([target, np.zeros((6, 3))]), rcond=None
    )[0]
    assert np.allclose(weights[:-1].numpy(), slope, atol=1e-10)
    assert np.allclose(weights[-1].numpy(), y.mean(0) - a.mean(0) @ slope, atol=1e-10)


def test_the_ridge_is_the_best_of_those_on_the_images_held_back():
    x, labels = drawn(width=30)
    held = torch.arange(40) % 4 == 0
    one = torch.cat([x[held].double(), torch.ones(10, 1).double()], dim=1)
    target = torch.nn.functional.one_hot(labels[held]).double()
    errors = [float((one @ fitted(x[~held], labels[~held], NONE[~held], r) - target).square().sum()) for r in RIDGES]
    best = RIDGES[errors.index(min(errors))]
    assert best not in (RIDGES[0], RIDGES[-1])
    assert torch.equal(fitted(x, labels, held), fitted(x, labels, held, best))


@pytest.mark.parametrize("name", [*MAPS, "vit_tiny_patch16_224"])
def test_a_sub_network_is_probed_as_the_extracted(name):
    """Also with merged tokens, and whatever the order and the batches of the bank."""
    net, bank = SuperNet(architectures.make(name)).eval(), make_batches((12, 12, 6))
    spec = {net.sites[0].name: 4} | ({"blocks.1.tokens": 7} if "vit" in name else {})
    small = net.extract(spec=spec)
    found = linear_probe(net, bank, make_batches(), spec)
    assert found.n == 12
    assert linear_probe(small, bank, make_batches()).top1 == found.top1
    turned = [(images.flip(0), labels.flip(0)) for images, labels in reversed(bank)]
    assert linear_probe(small, turned, make_batches()).loss == pytest.approx(found.loss, rel=1e-3)


def test_images_of_the_bank_are_told_apart():
    """Of more features than images, with hardly any ridge, all are."""
    assert linear_probe(make_model("plain"), make_batches(), make_batches(), ridge=1e-9).top1 == 100


def test_features_of_maps_are_the_mean_of_the_patches():
    for name, prefix in zip(MAPS, (5, 0), strict=True):
        model, images = architectures.make(name), make_images(3)
        with torch.no_grad():
            patches = model(images).flatten(1, -2)[:, prefix:]
            assert torch.allclose(
                features(model, images), torch.nn.functional.normalize(patches.mean(dim=1), dim=-1), atol=1e-6
            )


@pytest.mark.parametrize(
    ("bank", "ridge", "message"),
    [
        (make_batches(), 0.0, "ridge above 0"),
        ([], None, "bank has no images"),
        ([(make_images(2), torch.tensor([0, -1]))], None, "label -1"),
        ([make_images(2)], None, "bank: .*no labels"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(bank, ridge, message):
    with pytest.raises(StrataViTError, match=message):
        linear_probe(make_model("plain"), bank, make_batches(), ridge=ridge)


# ---- agreement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_agreement_of_maps_by_hand(name):
    net, images = SuperNet(architectures.make(name)).eval(), make_images(12)
    spec = {site.name: site.width // 2 for site in net.sites}
    with torch.no_grad():
        ours, theirs = net(images, spec), net(images)
    dims = tuple(range(1, ours.dim()))
    error = ((ours - theirs).square().sum(dims) / theirs.square().sum(dims)).mean()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
    for found in (
        compare_outputs(net, net, [images[:5], images[5:]], spec),
        compare_outputs(net.extract(spec=spec), net.source_copy(), [images[:5], images[5:]]),
    ):
        assert found.distance == pytest.approx(float(error), rel=1e-4)
        assert found.agreement == pytest.approx(100 * float(cosine), rel=1e-4)
        assert (found.n, found.classes) == (12, False)
    same = compare_outputs(net, net, [images])
    assert (same.distance, same.agreement) == (pytest.approx(0, abs=1e-9), pytest.approx(100))


def test_agreement_of_classes_is_that_of_the_first():
    net, images = make_net("plain"), make_images(40, seed=3)
    spec = {site.name: site.width // 2 for site in net.sites}
    with torch.no_grad():
        same = int((net(images, spec).argmax(1) == net(images).argmax(1)).sum())
    found = compare_outputs(net, net, [images.split(16)[0], images[16:]], spec)
    assert found.agreement == 100 * same / 40
    assert found.distance > 0


def test_outputs_of_different_shapes_are_refused():
    pooled = architectures.make("vit_small_patch14_reg4_dinov2")
    with pytest.raises(StrataViTError, match="made from"):
        compare_outputs(pooled, architectures.make(MAPS[0]), [make_images(2)])
    with pytest.raises(StrataViTError, match="no images"):
        compare_outputs(pooled, pooled, [])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_probes_and_compares(tmp_path, capsys):
    net = SuperNet(architectures.make(MAPS[0])).contract(make_batches()).stratify(make_batches(), plan=PLAN)
    net.save(tmp_path / "run")
    small = net.extract(macs=0.6, verbose=False)
    stratavit.save(small, tmp_path / "small")
    stratavit.export(small, tmp_path / "small.onnx")
    data = make_folder(tmp_path / "images", ["a", "b", "c"], train=4, val=2)
    rest = ["--data", data, "--workers", "0", "--device", "cpu"]
    asked = ["evaluate", tmp_path / "run", "--macs", "60%", *rest]
    found = output(capsys, *asked, "--probe", "--agreement")
    assert found["n"] == found["agreement"]["n"] == 6
    assert output(capsys, *asked, "--agreement")["agreement"] == found["agreement"]
    assert "top1" not in output(capsys, *asked, "--agreement")
    stated = output(capsys, *asked, "--probe", "0.1")
    for other in ("small", "small.onnx"):
        assert output(capsys, "evaluate", tmp_path / other, *rest, "--probe")["top1"] == found["top1"]
        again = output(capsys, "evaluate", tmp_path / other, *rest, "--probe", "0.1")
        assert again["loss"] == pytest.approx(stated["loss"], rel=1e-4)
    assert "--probe" in refusal(capsys, *asked)
    assert "--knn and --probe" in refusal(capsys, *asked, "--knn", "--probe")
    for ridge in ("-1", "0"):
        assert "ridge above 0" in refusal(capsys, *asked, "--probe", ridge)
    assert "--macs 50%" in refusal(capsys, "evaluate", tmp_path / "run", *rest, "--agreement")
    assert "one size" in refusal(capsys, "evaluate", tmp_path / "small", *rest, "--agreement", "--macs", "50%")
