"""Recipes: the paper's defaults, files, overrides, and one clear sentence for each mistake."""

import dataclasses
from pathlib import Path

import pytest

from stratavit import StrataViTError
from stratavit.training.recipe import PAPERS, RECOVERY, TRAINING, Recipe, field_types, read_toml


def test_defaults_are_the_papers():
    papers = {
        **{"lr": 5e-4, "min_lr": 1e-5, "weight_decay": 0.05, "warmup_epochs": 0, "epochs": 300, "ema_decay": 0.99996},
        **{"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "erasing": 0.25},
        **{"randaugment": "rand-m9-mstd0.5-inc1", "reduction": 0.875, "list_epochs": 50, "sampling": "uniform"},
        "proxy_images": 1024,
    }
    assert Recipe().to_dict().items() >= papers.items()
    assert Recipe.read("paper", kind="train") == Recipe()
    assert Recipe.read("paper", kind="finetune") == Recipe(mode="plain", epochs=30, lr=5e-5, min_lr=1e-6)


def test_every_key_is_documented():
    documented = Recipe.__doc__.split("Attributes:")[1]
    names = {part.strip() for line in documented.splitlines() if ":" in line for part in line.split(":")[0].split(",")}
    assert set(field_types()) <= names


def test_a_file_and_overrides(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('epochs = 60\nlr = 1\nsampling = "sandwich"  # a comment\n')
    recipe = Recipe.read(file, {"epochs": 70, "seed": 1})
    assert recipe == Recipe(epochs=70, lr=1.0, sampling="sandwich", seed=1)
    assert Recipe.read(file, {"seed": 1}, "train") == Recipe(**TRAINING | {"epochs": 60, "lr": 1.0, "seed": 1})
    assert Recipe.read(file, kind="train", begun=Recipe().to_dict()) == Recipe(epochs=60, lr=1.0, sampling="sandwich")
    file.write_text('base = "paper"\nepochs = 60\n')
    assert Recipe.read(file, kind="train") == Recipe.read(file) == Recipe(epochs=60)
    assert isinstance(recipe.lr, float)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch = 3", "'epoch'; .* mode, "),
        ("epochs = 3.5", r"epochs .* 3\.5"),
        ("epochs = true", "epochs .* True"),
        ('lr = "fast"', "lr .* 'fast'"),
        ("lr = -1.0", "lr .* at least 0"),
        ("epochs = 0", "epochs .* at least 1"),
        ("seed = 5000000000", "seed .* 4,294,967,296"),
        ("reduction = 1.5", "reduction .* above 0 and at most 1"),
        ("drop_path = 1.0", "drop_path .* below 1"),
        ("flip = 1.5", "flip .* from 0 to 1"),
        ('sampling = "always"', "sampling .* uniform, sandwich, budget, got 'always'"),
        ("epochs = 10", r"list_epochs \(50\) .* epochs \(10\)"),
        ("warmup_epochs = 300", "warmup_epochs"),
        ("batch_size = 3", "batch_size .* even"),
        ("compile_sizes = 1", "compile_sizes .* at least 2 .* piad"),
        ('compile_sizes = 4\nmode = "channel"', "compile_sizes .* mode channel"),
        ("tracker = 1", "tracker .* 1"),
        ("epochs = ", "TOML"),
        ('base = "theirs"', "base .* 'paper' .* 'theirs'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, named):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(StrataViTError, match=named) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(StrataViTError, match=r"none\.toml"):
        Recipe.read(tmp_path / "none.toml")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda f: f.stem)
def test_committed_recipes_read(file):
    recipe = Recipe.read(file)
    plain = "# Label-free recovery" if file.stem == "recover" else "# Dense "
    assert file.read_text().startswith("# PIAD of" if recipe.mode == "piad" else plain)
    if "imagenet" in file.stem:
        assert recipe == Recipe(epochs=150 if "base" in file.stem else 300, objective="label", measure="top1")
        assert "Published, not reproduced here" in file.read_text()


def test_the_average_of_a_short_run_follows_its_length():
    recipe = Recipe(ema_horizon=0.1)
    assert recipe.decay(1000) == pytest.approx(1 - 1 / 100)
    assert recipe.decay(5) == 0
    assert dataclasses.replace(recipe, ema_horizon=0.0).decay(5) == 0.99996


@pytest.mark.parametrize("images", [1, 2, 7, 8, 30, 300, 3000, 10**6])
@pytest.mark.parametrize("kind", PAPERS)
@pytest.mark.parametrize("processes", [1, 8])
def test_the_default_recipes_suit_any_number_of_images(images, kind, processes):
    recipe = Recipe.read(None, {"epochs": 1}, kind).sized(images, processes)
    assert recipe.sized(1) == recipe
    step = recipe.batch_size * processes
    if images >= processes:
        assert step <= images
        assert recipe.growths <= images // step
        assert recipe.decay(images // step) < 0.999
    assert 1 <= recipe.batch_size <= 128
    assert 3e-5 / 3 < recipe.rate(step) < 1e-3
    assert kind == "finetune" or recipe.stages == recipe.growths  # the list is complete before the only epoch ends
    asked = Recipe.read(None, {"epochs": 1}, kind)
    assert recipe.resumed(asked, "run") == recipe


def test_the_rate_follows_the_batch():
    assert Recipe(lr=1.0).rate(8) == 8 / 512
    assert Recipe(lr=1.0, lr_scaling="root").rate(8) == 1 / 8
    assert Recipe(lr=1.0, lr_scaling="root").rate(512) == Recipe(lr=1.0).rate(512) == 1


def test_the_recipe_of_recovery_is_its_default():
    assert Recipe(**read_toml(Path(__file__).parents[2] / "recipes/recover.toml")) == Recipe(**RECOVERY)


def test_the_paper_has_no_recipe_of_recovery():
    with pytest.raises(StrataViTError, match="paper"):
        Recipe.read("paper", kind="recover")


def test_the_default_rate_of_recovery_rises_slowly_and_stays_low_in_small_batches():
    recipe = Recipe(**RECOVERY)
    assert recipe.warmup_epochs > 0
    assert recipe.lr_unit == "relative"
    assert recipe.rate(recipe.batch_size) < 2e-3
