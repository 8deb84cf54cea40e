"""Recipes: the paper's defaults, files, overrides, and one clear sentence for each mistake."""

import dataclasses
from pathlib import Path

import pytest

from stratavit import StrataViTError
from stratavit.training.recipe import Recipe, field_types


def test_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.lr, recipe.min_lr, recipe.weight_decay, recipe.warmup_epochs) == (5e-4, 1e-5, 0.05, 0)
    assert (recipe.drop_path, recipe.mixup, recipe.cutmix, recipe.smoothing) == (0.1, 0.8, 1.0, 0.1)
    assert (recipe.erasing, recipe.ema_decay, recipe.epochs) == (0.25, 0.99996, 300)
    assert recipe.randaugment == "rand-m9-mstd0.5-inc1"
    assert (recipe.reduction, recipe.list_epochs, recipe.sampling, recipe.proxy_images) == (0.875, 50, "uniform", 1024)


def test_every_key_is_documented():
    documented = Recipe.__doc__.split("Attributes:")[1]
    names = {part.strip() for line in documented.splitlines() if ":" in line for part in line.split(":")[0].split(",")}
    assert set(field_types()) <= names


def test_a_file_and_overrides(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('epochs = 60\nlr = 1\nsampling = "sandwich"  # a comment\n')
    recipe = Recipe.read(file, {"epochs": 70})
    assert recipe == dataclasses.replace(Recipe(), epochs=70, lr=1.0, sampling="sandwich")
    assert isinstance(recipe.lr, float)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; the keys are mode, "),
        ("epochs = 3.5", "epochs must be a whole number, got 3.5"),
        ("epochs = true", "epochs must be a whole number, got True"),
        ('lr = "fast"', "lr must be a number, got 'fast'"),
        ("lr = nan", "lr must be finite"),
        ("lr = -1.0", "lr must not be negative"),
        ("epochs = 0", "epochs must be at least 1"),
        ("reduction = 1.5", "reduction must be above 0 and at most 1"),
        ("drop_path = 1.0", "drop_path must be at least 0 and below 1"),
        ('sampling = "always"', "sampling must be one of uniform, sandwich, budget, got 'always'"),
        ("sampling = 3", "sampling must be one of"),
        ("epochs = 10", r"list_epochs \(50\) must not exceed epochs \(10\)"),
        ("batch_size = 3", "batch_size must be even"),
        ("tracker = 1", "tracker must be a text"),
        ("epochs = ", "not valid TOML"),
        ("[train]\nepochs = 3", "unknown key 'train'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(StrataViTError, match=message) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda f: f.stem)
def test_committed_recipes_read(file):
    recipe = Recipe.read(file)
    assert file.read_text().startswith("# PIAD of" if recipe.mode == "piad" else "# Dense ")
    if "imagenet" in file.stem:
        papers = Recipe(epochs=150 if "base" in file.stem else 300, objective="label", measure="top1")
        assert recipe == papers
        assert "Published, not reproduced here" in file.read_text()


def test_a_missing_file(tmp_path):
    with pytest.raises(StrataViTError, match="cannot be read"):
        Recipe.read(tmp_path / "none.toml")


def test_the_average_of_a_short_run_follows_its_length():
    recipe = Recipe(ema_horizon=0.1)
    assert recipe.decay(1000) == pytest.approx(1 - 1 / 100)
    assert recipe.decay(5) == 0
    assert Recipe().decay(5) == 0.99996
