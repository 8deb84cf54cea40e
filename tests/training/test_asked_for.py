"""A run trains as it was asked to: teachers, rates, and keys of a recipe, of which idle ones are reported."""

import copy
import dataclasses
import hashlib
import itertools
from typing import get_args

import pytest
import timm
import torch
from helpers import make_batches, make_model, make_net
from torch import nn
from training_runs import TINY, Images

import stratavit
from stratavit import Recipe, StrataViTError
from stratavit.training.optimizer import optimiser_and_schedule
from stratavit.training.recipe import FINETUNING, LIST_KEYS, field_types
from stratavit.training.teacher import Teacher
from stratavit.training.unused_keys import idle_keys

SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 20}
STUDENT = {"input_size": (3, 32, 32), "mean": (0,) * 3, "std": (1,) * 3}


def normalised(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_with_batch_norm(dtype):
    one, same, other = (Teacher(normalised(seed).to(dtype), STUDENT).name for seed in (0, 0, 1))
    assert one == same != other


def test_a_teacher_that_has_seen_another_number_of_batches():
    model = normalised(0)
    before = Teacher(model, STUDENT).name
    model[1].num_batches_tracked += 1
    assert Teacher(model, STUDENT).name != before


@pytest.mark.parametrize("name", ["regnety_002", "test_vit"])
def test_teachers_of_timm_teach(name):
    model = timm.create_model(name, num_classes=7)
    small = make_net("plain").extract(spec=SPEC, verbose=False)
    recipe = dataclasses.replace(TINY, distil=0.5, epochs=1, list_epochs=1)
    stratavit.finetune(small, Images(), None, recipe, cpu=True, teacher=model)
    assert small.provenance["finetune"]["recipe"]["distil"] == 0.5


def test_the_name_of_other_teachers_is_as_it_was():
    """A resumed run asks for the teacher that it began with."""

    model, digest = make_model("plain"), hashlib.blake2b(digest_size=4)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert Teacher(model, STUDENT).name.endswith(digest.hexdigest())


@pytest.mark.parametrize("images", [1, 8, 11, 512, 4096])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_rate_never_rises_but_in_the_warm_up_and_never_falls_there(images, warmup):
    recipe = Recipe(epochs=5, list_epochs=5, warmup_epochs=warmup)
    model = nn.Linear(2, 2)
    optimiser, schedule = optimiser_and_schedule(model, recipe, images, 10)
    rates = []
    for step in range(50):
        schedule.step_update(step)
        rates.append(optimiser.param_groups[0]["lr"])
    top, whole = 10 * warmup, recipe.lr * images / 512
    assert max(rates) <= whole * (1 + 1e-9)
    assert all(b >= a for a, b in itertools.pairwise(rates[:top]))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(rates[top:]))
    assert min(rates) >= min(recipe.min_lr, whole) * (1 - 1e-9)


@pytest.mark.parametrize(("lr", "told"), [(5e-4, False), (1e-9, True)])
def test_a_rate_below_the_least_is_told(lr, told, capsys):
    recipe = dataclasses.replace(TINY, lr=lr, min_lr=1e-6, epochs=1, list_epochs=1)
    stratavit.finetune(make_net("plain").extract(spec=SPEC, verbose=False), Images(), None, recipe, cpu=True)
    assert ("below min_lr" in capsys.readouterr().err) == told


def write(folder, keys):
    path = folder / "recipe.toml"
    path.write_text("".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in keys.items()))
    return path


@pytest.mark.parametrize("form", ["mapping", "file", "recipe"])
@pytest.mark.parametrize("mode", ["piad", "plain", "channel", "weighted", "layerdrop"])
def test_no_small_model_is_left_without_its_teacher(mode, form, tmp_path):
    keys = {"mode": mode, "distil": 0.5, "workers": 0}
    config = {"mapping": keys, "file": write(tmp_path, keys), "recipe": Recipe(**keys)}[form]
    with pytest.raises(StrataViTError, match="distil needs a teacher"):
        stratavit.finetune(make_model("plain"), Images(), None, config, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_small_model_of_any_mode_learns_the_same(tmp_path, capsys):
    keys = {key: getattr(TINY, key) for key in ("epochs", "batch_size", "workers", "tracker", "repeats", "lr")}
    keys |= {"epochs": 1, "list_epochs": 1}
    found = []
    for mode in ("piad", "plain"):
        given = keys | {"mode": mode}
        config = given if mode == "piad" else write(tmp_path, given)
        model = make_net("plain").extract(spec=SPEC, verbose=False)
        out = tmp_path / f"{mode}-run"
        found.append(stratavit.finetune(model, Images(), make_batches(), config, out, cpu=True))
        stratavit.finetune(copy.deepcopy(model), Images(), make_batches(), config, out, cpu=True, resume=True)
    assert all(model.provenance["finetune"]["recipe"]["mode"] == "plain" for model in found)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in found), strict=True))
    assert "list_epochs" in capsys.readouterr().err


OTHER = {
    "layer_drop": 0.3,
    "compensation": "full",
    "reduction": 0.5,
    "list_epochs": 7,
    "growths": 2,
    "head_dim_unit": 4,
    "mlp_units": 16,
    "objective": "label",
    "measure": "loss",
    "sampling": "sandwich",
    "proxy_images": 64,
    "list_source": "given",
}


def other(key):

    kind, now = field_types()[key], getattr(Recipe(), key)
    return next(v for v in get_args(kind) if v != now) if get_args(kind) else OTHER[key]


@pytest.mark.parametrize("key", sorted(set(LIST_KEYS) - {"mode"}))
def test_every_key_of_the_list_is_told_of_a_small_model(key):
    recipe = Recipe.from_dict(FINETUNING | {key: other(key)})
    assert idle_keys(recipe, "small model", 7) == [key]


IDLE = [
    ({}, 7, []),
    ({"layer_drop": 0.3}, 7, ["layer_drop"]),
    ({"mode": "layerdrop", "layer_drop": 0.3}, 7, []),
    ({"mode": "weighted", "layer_drop": 0.3}, 7, ["layer_drop"]),
    ({"list_epochs": 7}, 7, []),
    ({"mode": "weighted", "list_epochs": 7}, 7, ["list_epochs"]),
    ({"mode": "plain", "sampling": "sandwich", "growths": 2}, 7, ["growths", "sampling"]),
    ({"mode": "channel", "sampling": "sandwich", "growths": 2}, 7, ["sampling"]),
    ({"sampling": "sandwich", "growths": 2, "distil": 0.5, "mixup": 0.1}, 7, []),
    ({"distil": 0.5, "mixup": 0.1, "cutmix": 0.5, "smoothing": 0.2}, 0, ["distil", "mixup", "cutmix", "smoothing"]),
    ({"ema_horizon": 0.1}, 7, []),
    ({"ema_horizon": 0.1, "ema_decay": 0.5}, 7, ["ema_decay"]),
    ({"keep": "raw"}, 7, []),
    ({"keep": "raw", "ema_decay": 0.5}, 7, ["ema_decay"]),
    ({"keep": "raw", "ema_horizon": 0.5}, 7, ["ema_horizon"]),
]


@pytest.mark.parametrize(("keys", "classes", "idle"), IDLE)
def test_keys_that_a_mode_has_no_use_for(keys, classes, idle):
    assert idle_keys(Recipe(**keys), "default", classes) == idle


@pytest.mark.parametrize(("keys", "classes", "idle"), [row for row in IDLE if row[1] and row[2]])
def test_and_it_has_none(keys, classes, idle):
    """The run is the same without them."""
    usual = Recipe().to_dict()
    found = []
    for given in (keys, keys | {key: usual[key] for key in idle}):
        recipe = dataclasses.replace(TINY, **{"epochs": 1, "list_epochs": 1, "proxy_images": 12} | given)
        if recipe.mode == "piad":
            recipe = dataclasses.replace(recipe, list_epochs=1)
        net = copy.deepcopy(make_net("plain"))
        found.append(stratavit.train_piad(net, Images(), None, recipe, proxy=make_batches(), cpu=True).state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
