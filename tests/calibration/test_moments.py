"""Moments of sorted sites: read from the device once for all, and as exact as if each had been looked at."""

import copy

import pytest
import torch
from helpers import FAMILIES, enliven, make_batches, make_model, make_net
from linear_maps import DEGENERATE, problem
from timm.models.vision_transformer import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import BlockingCopies, on_fake_cuda, reads

from stratavit import SuperNet
from stratavit.calibration import contraction, elimination, moments
from stratavit.calibration.elimination import elimination_order
from stratavit.calibration.site_observer import SiteObserver
from stratavit.calibration.statistics import observe
from stratavit.elastic.compensation import RIDGE, cholesky, rows_of

BATCHES = make_batches()


@pytest.fixture
def queued(monkeypatch):
    """Work is as on a device that queues it."""
    monkeypatch.setattr(elimination, "queues_work", lambda device: True)


def bent(covariance):
    """The same with a negative eigenvalue, as rounding makes them but larger."""
    values, vectors = torch.linalg.eigh(covariance)
    values[0] = -5 * RIDGE * values.mean()
    return vectors @ torch.diag(values) @ vectors.mT


def all_moments(module):
    return [module.moments, *(moments.to("cpu") for _, moments in module.crossed)]


def test_of_sites_sorted_together_only_what_has_no_factor_is_regularised_more(monkeypatch, queued):
    plain = SuperNet(make_model("plain")).contract(BATCHES)
    own, bad = SiteObserver.moments, []

    def spoiled(observer, folds):
        mean, covariance = own(observer, folds)
        bad[:] = bad or [observer]  # the first one that is asked
        return mean, bent(covariance) if observer is bad[0] and folds == (1,) else covariance

    monkeypatch.setattr(SiteObserver, "moments", spoiled)
    net, more = SuperNet(make_model("plain")).contract(BATCHES), []
    for name, module in net.elastic.items():
        for i, (found, expected) in enumerate(zip(all_moments(module), all_moments(plain.elastic[name]), strict=True)):
            assert found.energy == pytest.approx(expected.energy, rel=0.05)
            if found.ridge > 5 * expected.ridge:
                more.append(i)
                assert found.factor.isfinite().all()
                assert found.ridge == pytest.approx(10 * expected.ridge, rel=0.1)
            else:
                torch.testing.assert_close(found.factor, expected.factor, rtol=1e-4, atol=1e-5)
                assert found.ridge == pytest.approx(expected.ridge, rel=1e-6)
    assert more == [1]  # without fold 0


@pytest.mark.parametrize("case", DEGENERATE)
def test_orders_of_a_device_that_is_read_once_equal_those_of_a_cpu(case, monkeypatch):
    problems = [problem(1), DEGENERATE[case](*problem(2)), problem(3)]
    problems[2] = problems[2][0], bent(problems[2][1])
    outputs = min(len(weight) for weight, _ in problems)
    weights, covariances = torch.stack([w[:outputs] for w, _ in problems]), [s for _, s in problems]
    inverses = weights.new_empty(2, 3, 6, 6)
    elimination._invert(inverses[0], covariances)
    expected = elimination_order(weights, covariances)
    monkeypatch.setattr(elimination, "queues_work", lambda device: True)
    with reads(monkeypatch) as found:
        elimination._invert(inverses[1, :2], covariances[:2])
    assert found == ["tolist"]
    elimination._invert(inverses[1], covariances)  # and once more for the third
    for one, other in zip(*inverses, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10 * float(one.abs().max()))
    if case not in ("zero weight", "equal columns", "more channels than outputs"):  # channels are alike there
        assert torch.equal(elimination_order(weights, covariances), expected)


@pytest.mark.parametrize("family", ["plain", "layer_scale"])
def test_sorting_reads_from_the_device_as_often_however_many_sites_there_are(family, monkeypatch, queued):
    counts = []
    for depth in (1, 3):
        shape = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
        net = SuperNet(enliven(VisionTransformer(**shape, depth=depth, **FAMILIES[family])))
        observers, _ = observe(net.model, BATCHES, "auto", "none", "test", 0.5)
        with reads(monkeypatch) as found:
            contraction.sort_sites(net.model, observers, "output")
        counts.append(list(found))
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_in_float32_has_whole_rows(dtype):
    factor, _ = cholesky(problem(1)[1].to(dtype))
    assert rows_of(factor).is_contiguous()
    assert rows_of(factor).dtype == torch.float32


@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.0.mlp"])
def test_on_cuda_moments_are_made_without_waiting(name):
    """On tensors without data, which refuse whatever reads one."""
    net = copy.deepcopy(make_net("plain")).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        module = on_fake_cuda(net).elastic[name]
        n, shape = module.out.in_features, (module.heads, module.full_width, module.full_width)
        observer = SiteObserver(module, "none", 0.5)
        for fold in (0, 1):
            observer._covariance.update(torch.empty(9, n, device="cuda"), torch.empty(9, device="cuda"), fold)
        new = torch.empty(shape, device="cuda") if module.attention else torch.arange(n, device="cuda")
        products = moments.map_products(module)
        drafts = [moments.draft(module, observer, new, folds, products) for folds in ((0, 1), (1,), (0,))]
        assert observer.is_finite().device.type == "cuda"
    assert [tuple(one.numbers.shape) for one in drafts] == [(3,)] * 3
    assert drafts[0].moments.factor.device.type == drafts[1].moments.flat.device.type == "cuda"
    assert copies.found == []
