"""The calibration pass equals a direct computation by autograd on the stock timm model."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batches, make_images, make_model, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stratavit import StrataViTError, SuperNet
from stratavit.calibration import statistics
from stratavit.calibration.objectives import drawn_classes
from stratavit.calibration.site_observer import token_weights
from stratavit.calibration.statistics import collect
from stratavit.data.pixels import folds_of, keys_of

OBJECTIVES = {
    "label": lambda logits, labels: logits.gather(1, labels[:, None]).sum(),
    "cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"),
    "prediction": lambda logits, labels: logits.max(dim=-1).values.sum(),
}


def score(model, images, labels, objective):
    """The scalar that is differentiated, of a stock model."""
    if objective == "feature":
        return model.forward_head(model.forward_features(images), pre_logits=True).square().sum() / 2
    return OBJECTIVES[objective](model(images), labels)


def by_autograd(model, images, labels, objective):
    """Site name -> taylor, hessian, mean, scatter and plain scatter, from the stock model in one batch.

    And what `proj` / `fc2` reads, with the gradient norm at its output, one number a token.
    """
    seen = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = output

        return hook

    def keep_input(name):
        def hook(module, args):
            args[0].retain_grad()
            seen[name] = args[0]

        return hook

    for index, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(keep(f"blocks.{index}.attn"))
        block.attn.proj.register_forward_pre_hook(keep_input(f"blocks.{index}.attn.proj"))
        block.attn.proj.register_forward_hook(keep(f"blocks.{index}.attn.out"))
        block.mlp.fc2.register_forward_pre_hook(keep_input(f"blocks.{index}.mlp"))
        block.mlp.fc2.register_forward_hook(keep(f"blocks.{index}.mlp.out"))
    score(model, images, labels, objective).backward()

    expected = {}
    for index, block in enumerate(model.blocks):
        name, heads = f"blocks.{index}.attn", block.attn.num_heads
        shape = (-1, 3, heads, block.attn.head_dim)
        features, gradient = seen[name].detach().reshape(shape), seen[name].grad.reshape(shape)
        product = features * gradient  # [T, 3, H, d]
        centred = features - features.mean(dim=0)
        weight = product.abs().mean(dim=-1)  # [T, 3, H]
        expected[name] = {
            "taylor": product.abs().mean(dim=0),
            "hessian": product.square().mean(dim=0) / 2,
            "channel_mean": seen[f"{name}.proj"].detach().flatten(0, 1).mean(dim=0).view(heads, -1),
            "weighted": torch.einsum("tgh,tghi,tghj->ghij", weight, centred, centred),
            "plain": torch.einsum("tghi,tghj->ghij", centred, centred),
        }
        hidden = seen[f"blocks.{index}.mlp"]
        product = (hidden * hidden.grad).detach().flatten(0, 1)  # [T, m]
        expected[f"blocks.{index}.mlp"] = {
            "taylor": product.abs().mean(dim=0).view(1, 1, -1),
            "hessian": product.square().mean(dim=0).view(1, 1, -1) / 2,
            "channel_mean": hidden.detach().flatten(0, 1).mean(dim=0).view(1, -1),
        }
        for site, read in ((name, seen[f"{name}.proj"]), (f"blocks.{index}.mlp", hidden)):
            expected[site]["read"] = read.detach().flatten(0, 1)
            expected[site]["weight"] = seen[f"{site}.out"].grad.norm(dim=-1).flatten()
    return expected


def assert_close(found: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5):
    assert found.dtype == torch.float64
    assert found.shape == expected.shape, name
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{name}: {error}"


def run(model, loader, **options):
    return collect(SuperNet(model).model, loader, **options)


def joined(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def assert_same(found, expected, tolerance):
    """Everything that one pass found is what another one found."""
    assert found.keys() == expected.keys()
    for name, result in found.items():
        for key, value in vars(result).items():
            other = getattr(expected[name], key)
            if isinstance(value, Tensor) and value.numel():
                exact = value.double() if key == "covariance" else value  # which is as precise as the tokens
                assert_close(exact, other, f"{name}.{key}", tolerance)
        for pair, others in zip(result.crossed, expected[name].crossed, strict=True):
            assert_close(pair[0], others[0], f"{name}.crossed mean", tolerance)
            assert_close(pair[1].double(), others[1], f"{name}.crossed", tolerance)


def mixed_moments(read, norms, share):
    """Mean and covariance of the tokens of 12 images ``[T, n]``, a share of each image's weight by gradient norms."""
    norms = norms.view(12, -1)
    mixed = (1 - share) / len(read) + share * (norms / norms.sum(dim=1, keepdim=True)).flatten() / len(norms)
    mean = mixed @ read
    centred = read - mean
    return mean, centred.T @ (centred * mixed[:, None])


@given(st.floats(0, 1), st.integers(0, 99))
def test_weights_of_tokens_do_not_depend_on_the_scale_of_an_image(share, seed):
    """Where no token has a gradient, all weigh the same."""
    norms = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norms[2] = 0
    found = token_weights(norms, share)
    assert_close(found, token_weights(norms * torch.tensor([[1e-9], [1.0], [1e9]]), share), "scale", 1e-9)
    assert_close(found.mean(dim=1), torch.ones(3, dtype=torch.float64), "mean", 1e-9)
    assert found.min() >= 1 - share - 1e-9
    assert torch.equal(found[2], torch.ones_like(found[2]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_noticed(bad):
    """Features are finite all the same, and where heads stay whole, q and k add up nothing that would tell."""

    def spoil(_module, _inputs, output):
        output.register_hook(lambda gradient: gradient * bad)

    net = SuperNet(make_model("plain"), whole_heads=True)
    net.model.norm.register_forward_hook(spoil)
    with pytest.raises(StrataViTError, match=r"blocks\.0\.attn produced NaN"):
        collect(net.model, make_batches(), token_weight=0.5)


@pytest.mark.parametrize("objective", [*OBJECTIVES, "feature"])
def test_equals_autograd_on_the_stock_model(family, objective):
    """Covariances: the tokens of an image weighted by the gradient norm at the module's output."""
    model, batches = make_model(family, dtype=torch.float64), make_batches(dtype=torch.float64)
    found = run(model, batches, objective=objective)
    moments = run(model, batches, objective=objective, token_weight=0.5)
    expected = by_autograd(model, *joined(batches), objective)
    assert found.keys() == moments.keys() == expected.keys()
    for name, values in expected.items():
        one, other, scatter = found[name], moments[name], values.get("weighted")
        for key in ("taylor", "hessian", "channel_mean"):
            assert_close(getattr(one, key), values[key], f"{name}.{key}")
        mean, covariance = mixed_moments(values["read"], values["weight"], 0.5)
        assert_close(other.channel_mean, mean.view(values["channel_mean"].shape), f"{name}.channel_mean")
        assert_close(other.covariance, covariance, f"{name}.covariance")
        assert other.taylor.numel() == other.hessian.numel() == 0
        assert one.images == other.images == 12
        if scatter is None:
            assert one.scatter is other.scatter is None
        else:
            assert_close(one.scatter, scatter, f"{name}.scatter")
            assert_close(other.scatter, scatter[:2], f"{name}.scatter")


def test_scatter_of_the_unweighted_and_of_no_kind():
    model, batches = make_model("plain", dtype=torch.float64), make_batches(dtype=torch.float64)
    plain, none = (run(model, batches, scatter=kind) for kind in ("plain", "none"))
    expected = by_autograd(model, *joined(batches), "label")
    assert_close(plain["blocks.1.attn"].scatter, expected["blocks.1.attn"]["plain"], "plain")
    assert all(result.scatter is None for result in none.values())


@pytest.mark.parametrize(
    ("token_weight", "objective", "tolerance"),
    [(None, "label", 1e-5), (0.5, "cross_entropy", 1e-9), (0.5, "sampled", 1e-9)],
)
def test_order_and_batch_size_change_rounding_only(family, token_weight, objective, tolerance):
    model, batches = make_model(family, dtype=torch.float64), make_batches(dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    images, labels = (part[order].split(1) for part in joined(batches))
    options = {"objective": objective, "token_weight": token_weight}
    shuffled = run(model, list(zip(images, labels, strict=True)), **options)
    assert_same(shuffled, run(model, batches, **options), tolerance)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_how_many_images_run_at_a_time_changes_rounding_only(family, token_weight, monkeypatch):
    """All of a batch, or two at a time, over the border of the folds, too."""
    source, loader = make_model(family, dtype=torch.float64), [joined(make_batches(dtype=torch.float64))]
    expected = run(source, loader, token_weight=token_weight)
    monkeypatch.setattr(statistics, "HOST_NUMBERS", 1)
    assert_same(run(source, loader, token_weight=token_weight), expected, 1e-9 if token_weight else 1e-6)


@given(images=st.integers(1, 40), numbers=st.integers(1, 300))
def test_every_image_of_a_batch_runs_once(images, numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "HOST_NUMBERS", numbers)
        runs = statistics._runs(torch.zeros(images, 3, 4))
    assert [number for some in runs for number in range(images)[some]] == list(range(images))
    assert max(some.stop - some.start for some in runs) <= max(statistics.LEAST_IMAGES, numbers // 12)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_float32_agrees_with_float64(token_weight):
    found, exact = (
        run(make_model("plain", dtype=dtype), make_batches(dtype=dtype), token_weight=token_weight)
        for dtype in (torch.float32, torch.float64)
    )
    assert_same(found, exact, 1e-4)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_widths_in_use_are_observed_and_skipped_modules_left_out(token_weight):
    net = SuperNet(make_model("plain"))
    with net.at({"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 40}):
        found = collect(net.model, make_batches(), token_weight=token_weight)
    assert found.keys() == {"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"}
    attention, mlp = found["blocks.0.attn"], found["blocks.1.mlp"]
    assert attention.scatter.shape[-2:] == (8, 8)
    assert attention.channel_mean.shape == (2, 8)
    if token_weight is None:
        assert mlp.taylor.shape == (1, 1, 40)
    else:
        assert (attention.covariance.shape, mlp.covariance.shape) == ((16, 16), (40, 40))


def test_sampled_is_the_cross_entropy_of_classes_drawn_from_the_prediction():
    """Labels of the loader are not looked at, and the global generator is left alone."""
    model, batches, before = make_model("plain"), make_batches(), torch.get_rng_state()
    with torch.no_grad():
        labelled = [(images, drawn_classes(model(images), keys_of(images), 7)) for images, _ in batches]
    found = run(model, batches, objective="sampled", token_weight=0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found, run(model, labelled, objective="cross_entropy", token_weight=0.5), 1e-5)


def test_classes_are_drawn_as_often_as_the_prediction_says_and_by_image_and_seed_alone():
    """Within four standard errors; never one whose probability is 0."""
    images, chances = torch.randn(4000, 1, 2, 2), torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    logits, keys = chances.log().expand(4000, -1), keys_of(images)
    drawn, order = drawn_classes(logits, keys, 3), torch.randperm(4000)
    shares = torch.bincount(drawn, minlength=5) / 4000
    assert ((shares - chances).abs() <= 4 * (chances * (1 - chances) / 4000).sqrt()).all()
    assert torch.equal(drawn_classes(logits, keys_of(images[order]), 3), drawn[order])
    assert not torch.equal(drawn_classes(logits, keys, 4), drawn)


def test_folds_keep_their_moments_apart():
    """Those without fold 0 are the moments of the images of fold 1 alone."""
    model, batches = make_model("plain", dtype=torch.float64), make_batches(dtype=torch.float64)
    images, labels = joined(batches)
    folds = folds_of(keys_of(images))
    found = run(model, batches, token_weight=0.0)
    for fold in (0, 1):
        kept = folds != fold
        assert kept.any()
        for name, alone in run(model, [(images[kept], labels[kept])], token_weight=0.0).items():
            mean, covariance = found[name].crossed[fold]
            assert_close(mean, alone.channel_mean, name, 1e-9)
            assert_close(covariance, alone.covariance, name, 1e-9)


BARE = [images for images, _ in make_batches()]


@pytest.mark.parametrize(
    ("loader", "token_weight", "objective"),
    [
        (make_batches(), None, "label"),
        (BARE, None, "prediction"),
        ([(images,) for images in BARE], None, "prediction"),
        (make_batches(), 1.0, "cross_entropy"),
        (BARE, 1.0, "sampled"),
    ],
)
def test_auto_suits_the_method_and_the_labels(loader, token_weight, objective):
    model = make_model("plain")
    found = run(model, loader, token_weight=token_weight)
    assert_same(found, run(model, make_batches(), objective=objective, token_weight=token_weight), 0)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_without_a_head_the_features_are_the_objective(token_weight):
    model = make_model("plain")
    with_head = run(model, make_batches(), objective="feature", token_weight=token_weight)
    model.reset_classifier(0)
    assert_same(run(model, BARE, token_weight=token_weight), with_head, 0)
    for name in OBJECTIVES:
        with pytest.raises(StrataViTError, match=f"'{name}'"):
            run(model, make_batches(), objective=name)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_accumulators_do_not_grow_with_the_number_of_images(monkeypatch, token_weight):
    made, held = [], []

    class Recorded(statistics.SiteObserver):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(statistics, "SiteObserver", Recorded)
    for batches in (2, 8):
        made.clear()
        run(make_model("plain"), make_batches((6,) * batches), token_weight=token_weight)
        held.append([sum(tensors_of(observer).values()) for observer in made])
    assert held[0] == held[1]
    assert min(held[0]) > 256


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was_and_gradients_may_be_switched_off(training):
    net = SuperNet(make_model("plain"))
    net.model.train(training)
    net.model.cls_token.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in net.model.named_parameters()}
    for loader, outcome in ((make_batches(), nullcontext()), ([torch.zeros(3)], pytest.raises(StrataViTError))):
        with outcome, torch.no_grad():
            collect(net.model, loader)
        assert all(module.observer is None for module in net.elastic.values())
        assert all(module.training == training for module in net.model.modules())
        for name, parameter in net.model.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
            assert parameter.grad is None


IMAGES = make_images(2)
BAD = {
    "no images": ([], {}, "no images"),
    "labels needed": ([IMAGES], {"objective": "label"}, "'label'"),
    "negative label": ([(IMAGES, torch.tensor([-1, 0]))], {}, "-1"),
    "unknown objective": ([IMAGES], {"objective": "loss"}, "objective"),
    "NaN image": ([torch.full_like(IMAGES, float("nan"))], {}, "blocks.0.attn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case):
    loader, options, words = BAD[case]
    with pytest.raises(StrataViTError, match=words) as caught:
        run(make_model("plain"), loader, **options)
    assert "\n" not in str(caught.value)


def test_products_are_those_of_full_float32_whatever_the_process_allows():
    model, batches, before = make_model("plain"), make_batches(), torch.get_float32_matmul_precision()
    expected, seen = run(model, batches, token_weight=0.5), []

    def watched():
        for batch in batches:
            seen.append(torch.get_float32_matmul_precision())
            yield batch

    try:
        torch.set_float32_matmul_precision("medium")
        assert_same(run(model, watched(), token_weight=0.5), expected, 1e-9)
        assert (set(seen), torch.get_float32_matmul_precision()) == ({"highest"}, "medium")
    finally:
        torch.set_float32_matmul_precision(before)
