"""The calibration pass equals a direct computation by autograd on the stock timm model."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, make_batches, make_images, make_model
from torch import Tensor

from stratavit import StrataViTError, SuperNet
from stratavit.calibration import statistics
from stratavit.calibration.objectives import drawn_classes
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


@pytest.mark.parametrize("objective", [*OBJECTIVES, "feature"])
def test_equals_autograd_on_the_stock_model(family, objective):
    model = make_model(family, dtype=torch.float64)
    batches = make_batches(dtype=torch.float64)
    found = run(model, batches, objective=objective)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = by_autograd(model, images, labels, objective)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for key in ("taylor", "hessian", "channel_mean"):
            assert_close(getattr(found[name], key), values[key], f"{name}.{key}")
        if "weighted" in values:
            assert_close(found[name].scatter, values["weighted"], f"{name}.scatter")
        else:
            assert found[name].scatter is None
        assert found[name].images == 12


def test_without_a_head_the_features_are_the_objective():
    model = make_model("plain")
    model.reset_classifier(0)
    auto, feature = (run(model, make_batches(), objective=name) for name in ("auto", "feature"))
    assert torch.equal(auto["blocks.0.mlp"].taylor, feature["blocks.0.mlp"].taylor)
    for name in ("label", "cross_entropy", "prediction", "sampled"):
        with pytest.raises(StrataViTError, match=f"objective '{name}' needs a head"):
            run(model, make_batches(), objective=name)


def test_scatter_of_the_unweighted_and_of_no_kind():
    batches = make_batches(dtype=torch.float64)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = by_autograd(make_model("plain", dtype=torch.float64), images, labels, "label")
    plain = run(make_model("plain", dtype=torch.float64), batches, scatter="plain")
    assert_close(plain["blocks.1.attn"].scatter, expected["blocks.1.attn"]["plain"], "plain")
    none = run(make_model("plain", dtype=torch.float64), batches, scatter="none")
    assert all(result.scatter is None for result in none.values())


def mixed_moments(read, weight, share):
    """Mean and covariance of tokens ``[T, n]``, a share of their weight in proportion to `weight`."""
    mixed = (1 - share) / len(read) + share * weight / weight.sum()
    mean = mixed @ read
    centred = read - mean
    return mean, centred.T @ (centred * mixed[:, None])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective", ["cross_entropy", "feature"])
def test_covariances_equal_autograd_on_the_stock_model(family, objective, share):
    """Tokens weighted by the gradient norm at the module's output, over all batches at once."""
    model = make_model(family, dtype=torch.float64)
    batches = make_batches(dtype=torch.float64)
    found = run(model, batches, objective=objective, token_weight=share)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = by_autograd(model, images, labels, objective)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        mean, covariance = mixed_moments(values["read"], values["weight"], share)
        assert_close(found[name].channel_mean, mean.view(values["channel_mean"].shape), f"{name}.channel_mean")
        assert_close(found[name].covariance, covariance, f"{name}.covariance")
        assert found[name].taylor.numel() == found[name].hessian.numel() == 0
        assert found[name].images == 12
        if "weighted" in values:
            assert_close(found[name].scatter, values["weighted"][:2], f"{name}.scatter")
        else:
            assert found[name].scatter is None


@pytest.mark.parametrize("sizes", [(12,), (7, 5), (1,) * 12])
def test_covariances_do_not_depend_on_the_batch_size(sizes):
    expected = run(make_model("odd_widths"), make_batches(), token_weight=0.5)
    for name, result in run(make_model("odd_widths"), make_batches(sizes), token_weight=0.5).items():
        for key in ("channel_mean", "covariance", "scatter"):
            if getattr(result, key) is not None:
                assert_close(getattr(result, key), getattr(expected[name], key), f"{name}.{key}", 5e-5)


def test_covariances_at_cut_widths_are_those_of_the_kept_channels():
    net = SuperNet(make_model("plain"))
    with net.at({"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 40}):
        found = collect(net.model, make_batches(), token_weight=0.5)
    assert found.keys() == {"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"}
    assert found["blocks.0.attn"].covariance.shape == (16, 16)
    assert found["blocks.0.attn"].scatter.shape == (2, 2, 8, 8)
    assert found["blocks.1.mlp"].covariance.shape == (40, 40)


def drawn_labels(model, images, seed):
    """One class an image, drawn from the model's own prediction."""
    with torch.no_grad():
        return drawn_classes(model(images), keys_of(images), seed)


@pytest.mark.parametrize("seed", [0, 7])
def test_sampled_is_the_cross_entropy_of_classes_drawn_from_the_prediction(family, seed):
    """Labels of the loader are not looked at."""
    model = make_model(family)
    batches = make_batches()
    labelled = [(images, drawn_labels(model, images, seed)) for images, _ in batches]
    found = run(model, batches, objective="sampled", token_weight=0.5, seed=seed)
    expected = run(model, labelled, objective="cross_entropy", token_weight=0.5)
    for name, result in found.items():
        assert_close(result.covariance, expected[name].covariance, name)
        assert_close(result.channel_mean, expected[name].channel_mean, name)


def test_classes_are_drawn_as_often_as_the_prediction_says():
    """Within four standard errors; never one whose probability is 0."""
    images, chances = torch.randn(4000, 1, 2, 2), torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    for seed in (0, 1):
        drawn = drawn_classes(chances.log().expand(4000, -1), keys_of(images), seed)
        shares = torch.bincount(drawn, minlength=5) / 4000
        assert ((shares - chances).abs() <= 4 * (chances * (1 - chances) / 4000).sqrt()).all()


def test_a_draw_depends_on_image_and_seed_alone():
    images, logits = torch.randn(200, 1, 2, 2), torch.randn(200, 9)
    drawn, order = drawn_classes(logits, keys_of(images), 3), torch.randperm(200)
    assert torch.equal(drawn_classes(logits[order], keys_of(images[order]), 3), drawn[order])
    assert not torch.equal(drawn_classes(logits, keys_of(images), 4), drawn)


@pytest.mark.parametrize("objective", ["cross_entropy", "sampled"])
def test_the_order_of_the_images_changes_rounding_only(family, objective):
    model, batches = make_model(family, dtype=torch.float64), make_batches(dtype=torch.float64)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = list(zip(images[order].split(5), labels[order].split(5), strict=True))
    expected = run(model, batches, objective=objective, token_weight=0.5)
    for name, found in run(model, shuffled, objective=objective, token_weight=0.5).items():
        pairs = [(found.covariance, expected[name].covariance)]
        for ours, theirs in zip(found.crossed, expected[name].crossed, strict=True):
            pairs += list(zip(ours, theirs, strict=True))
        for ours, theirs in pairs:
            assert_close(ours, theirs, name, 1e-9)


def test_folds_keep_their_moments_apart():
    """Those without fold 0 are the moments of the images of fold 1 alone."""
    model, batches = make_model("plain", dtype=torch.float64), make_batches(dtype=torch.float64)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    folds = folds_of(keys_of(images))
    assert set(folds.tolist()) == {0, 1}
    crossed = {name: found.crossed for name, found in run(model, batches, token_weight=0.0).items()}
    for fold in (0, 1):
        kept = folds != fold
        alone = run(model, [(images[kept], labels[kept])], token_weight=0.0)
        for name, pairs in crossed.items():
            assert_close(pairs[fold][0], alone[name].channel_mean, name, 1e-9)
            assert_close(pairs[fold][1], alone[name].covariance, name, 1e-9)


def test_sampled_is_fixed_by_the_seed():
    first, again, other = (
        run(make_model("plain"), make_batches(), objective="sampled", token_weight=1.0, seed=seed) for seed in (1, 1, 2)
    )
    for name, result in first.items():
        assert torch.equal(result.covariance, again[name].covariance)
        assert not torch.allclose(result.covariance, other[name].covariance, rtol=1e-4)


def test_drawing_classes_leaves_the_global_generator_alone():
    net, before = SuperNet(make_model("plain")), torch.get_rng_state()
    collect(net.model, make_batches(), objective="sampled", token_weight=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_of_covariances_is_a_likelihood():
    """Of the labels where they are there, else of classes drawn from the prediction."""
    model, labelled = make_model("plain"), make_batches()
    bare = [images for images, _ in labelled]
    for loader, objective in ((labelled, "cross_entropy"), (bare, "sampled")):
        found = run(model, loader, token_weight=1.0)["blocks.0.mlp"]
        expected = run(model, labelled, objective=objective, token_weight=1.0)["blocks.0.mlp"]
        assert torch.equal(found.covariance, expected.covariance)


def test_feature_needs_no_head():
    model = make_model("plain")
    with_head = run(model, make_batches(), objective="feature", token_weight=0.5)
    model.reset_classifier(0)
    bare = run(model, [images for images, _ in make_batches()], objective="feature", token_weight=0.5)
    assert torch.equal(bare["blocks.0.attn"].covariance, with_head["blocks.0.attn"].covariance)


def test_float32_agrees_with_float64():
    exact = run(make_model("plain", dtype=torch.float64), make_batches(dtype=torch.float64))
    for name, result in run(make_model("plain"), make_batches()).items():
        for key in ("taylor", "hessian", "channel_mean"):
            assert_close(getattr(result, key), getattr(exact[name], key), f"{name}.{key}", 1e-4)


@pytest.mark.parametrize("sizes", [(12,), (7, 5), (1,) * 12])
def test_result_does_not_depend_on_the_batch_size(sizes):
    expected = run(make_model("odd_widths"), make_batches())
    for name, result in run(make_model("odd_widths"), make_batches(sizes)).items():
        for key in ("taylor", "hessian", "channel_mean", "scatter"):
            if getattr(result, key) is not None:
                assert_close(getattr(result, key), getattr(expected[name], key), f"{name}.{key}", 2e-5)


def numbers_held(thing, visited=None) -> int:
    """Tensor elements reachable from an object's attributes."""
    visited = set() if visited is None else visited
    if id(thing) in visited:
        return 0
    visited.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.numel()
    parts = list(thing) if isinstance(thing, list | tuple) else list(getattr(thing, "__dict__", {}).values())
    return sum(numbers_held(part, visited) for part in parts)


@pytest.mark.parametrize("token_weight", [None, 0.5])
def test_accumulators_do_not_grow_with_the_number_of_images(monkeypatch, token_weight):
    made = []

    class Recorded(statistics.SiteObserver):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(statistics, "SiteObserver", Recorded)
    held = []
    for batches in (1, 8):
        made.clear()
        run(make_model("plain"), make_batches((3,) * batches), token_weight=token_weight)
        held.append([numbers_held(observer) for observer in made])
    assert held[0] == held[1]
    assert min(held[0]) > 0


def test_auto_uses_labels_when_they_are_there():
    labelled, model = make_batches(), make_model("plain")
    bare = [images for images, _ in labelled]
    for loader, objective in ((labelled, "label"), (bare, "prediction"), ([(x,) for x in bare], "prediction")):
        found, expected = run(model, loader), run(model, labelled, objective=objective)
        assert torch.equal(found["blocks.0.mlp"].taylor, expected["blocks.0.mlp"].taylor)


def test_widths_in_use_are_observed_and_skipped_modules_left_out():
    net = SuperNet(make_model("plain"))
    with net.at({"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 40}):
        found = collect(net.model, make_batches())
    assert found.keys() == {"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"}
    assert found["blocks.0.attn"].scatter.shape == (3, 2, 8, 8)
    assert found["blocks.1.mlp"].taylor.shape == (1, 1, 40)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    net = SuperNet(make_model("plain"))
    net.model.train(training)
    net.model.cls_token.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in net.model.named_parameters()}
    for loader, outcome in ((make_batches(), nullcontext()), ([torch.zeros(3)], pytest.raises(StrataViTError))):
        with outcome:
            collect(net.model, loader)
        assert all(module.observer is None for module in net.elastic.values())
        assert all(module.training == training for module in net.model.modules())
        for name, parameter in net.model.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
            assert parameter.grad is None


def test_works_where_gradients_are_switched_off():
    with torch.no_grad():
        found = run(make_model("plain"), make_batches())
    assert torch.equal(found["blocks.0.attn"].taylor, run(make_model("plain"), make_batches())["blocks.0.attn"].taylor)


IMAGES = make_images(2)
BAD = {
    "no images": ([], {}, "no images"),
    "labels needed": ([IMAGES], {"objective": "label"}, "needs labels.*'sampled'"),
    "labels needed by cross-entropy": ([IMAGES], {"objective": "cross_entropy"}, "needs labels"),
    "label too high": ([(IMAGES, torch.tensor([0, CLASSES]))], {}, f"found {CLASSES}.*{CLASSES} classes"),
    "negative label": ([(IMAGES, torch.tensor([-1, 0]))], {}, "found -1"),
    "one label for two images": ([(IMAGES, torch.tensor([1]))], {}, "shapes"),
    "not images": ([torch.zeros(2, 5)], {}, "images \\[B, 3, H, W\\]"),
    "no images by name": ([{"pixels": IMAGES}], {}, "got a mapping of pixels"),
    "not tensors": ([{"image": IMAGES.tolist()}], {}, "loader: expected batches"),
    "three parts": ([(IMAGES, IMAGES, IMAGES)], {}, "loader: expected batches"),
    "unknown objective": ([IMAGES], {"objective": "loss"}, "objective: expected one of auto, label"),
    "NaN image": ([torch.full_like(IMAGES, float("nan"))], {}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case):
    loader, options, words = BAD[case]
    with pytest.raises(StrataViTError, match=words) as caught:
        run(make_model("plain"), loader, **options)
    assert "\n" not in str(caught.value)
