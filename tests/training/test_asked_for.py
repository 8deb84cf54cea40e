"""A run trains as it was asked to: teachers, rates, and keys of a recipe, of which idle ones are reported."""

import copy
import dataclasses
import hashlib
import itertools
import json

import pytest
import timm
import torch
from helpers import make_batches, make_model, make_net
from torch import nn
from training_runs import ONE, TINY, Images, assert_same

import stratavit
from stratavit import Recipe, StrataViTError
from stratavit.training.optimizer import optimiser_and_schedule
from stratavit.training.recipe import FINETUNING, LIST_KEYS
from stratavit.training.teacher import Teacher
from stratavit.training.unused_keys import idle_keys, report_unused

SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 20}
STUDENT = {"input_size": (3, 32, 32), "mean": (0,) * 3, "std": (1,) * 3}


def normalised(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))


def test_the_name_of_a_teacher_tells_weights_apart():
    """Batch norm and bfloat16 too; names stay as they are, since a resumed run asks for its teacher."""
    for dtype in (torch.float32, torch.bfloat16):
        one, same, other = (Teacher(normalised(seed).to(dtype), STUDENT).name for seed in (0, 0, 1))
        assert one == same != other
    counted = normalised(0)
    counted[1].num_batches_tracked += 1
    assert Teacher(counted, STUDENT).name != Teacher(normalised(0), STUDENT).name
    model, digest = make_model("plain"), hashlib.blake2b(digest_size=4)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert Teacher(model, STUDENT).name.endswith(digest.hexdigest())


def test_a_convolutional_teacher_of_timm():
    model = timm.create_model("regnety_002", num_classes=7)
    small = make_net("plain").extract(spec=SPEC, verbose=False)
    recipe = dataclasses.replace(ONE, distil=0.5, accumulate=6)
    stratavit.finetune(small, Images(), None, recipe, cpu=True, teacher=model)
    assert small.provenance["finetune"]["teacher"] == Teacher(model, STUDENT).name


@pytest.mark.parametrize("images", [1, 4096])  # a rate below the least, and above
@pytest.mark.parametrize("warmup", [0, 3])
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


def test_biases_and_norms_learn_at_a_multiple_of_the_rate():
    model = make_model("plain")
    model.head.requires_grad_(False)
    recipe = Recipe(bias_norm_lr_scale=4.0, warmup_epochs=2)
    optimiser, schedule = optimiser_and_schedule(model, recipe, 512, 10)
    known = []
    for step in (1, 300, 1999):
        schedule.step_update(step)
        base = optimiser.param_groups[0]["lr"]
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                vector = parameter.dim() == 1
                assert group["lr"] == pytest.approx(base * (4 if vector else 1))
                assert group["weight_decay"] == 0 or not vector
                known.append(id(parameter))
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert set(known) == learning
    assert len(known) == 3 * len(learning)


def test_relative_rates_follow_the_size_of_the_weights():
    model = make_model("plain")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(8)
        model.head.bias.zero_()
    recipe = Recipe(lr_unit="relative", bias_norm_lr_scale=4.0, lr=0.01)
    optimiser, schedule = optimiser_and_schedule(model, recipe, 512, 10)
    schedule.step_update(0)
    rates = {id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        size = max(float(parameter.detach().square().mean().sqrt()), 1e-3)
        share = rates[id(parameter)] / size / (4 if parameter.dim() == 1 else 1)
        assert share * (1 + 1e-6) >= 0.01 * 2**-0.25, name
        assert share <= 0.01 * 2**0.25 * (1 + 1e-6), name
    first, second = (rates[id(model.blocks[index].mlp.fc1.weight)] for index in (0, 1))
    assert 4 < first / second < 16


@pytest.mark.parametrize(("lr", "reported"), [(5e-4, False), (1e-9, True)])
def test_a_rate_below_the_least_is_reported(lr, reported, capsys):
    report_unused(dataclasses.replace(TINY, lr=lr, min_lr=1e-6), "default", 7, processes=1)
    assert ("below min_lr" in capsys.readouterr().err) == reported


def write(folder, keys):
    path = folder / "recipe.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


@pytest.mark.parametrize("form", ["mapping", "file", "recipe"])
def test_no_small_model_is_left_without_its_teacher(form, tmp_path):
    keys = {"mode": "weighted", "distil": 0.5, "workers": 0}
    config = {"mapping": keys, "file": write(tmp_path, keys), "recipe": Recipe(**keys)}[form]
    with pytest.raises(StrataViTError, match="distil needs a teacher"):
        stratavit.finetune(make_model("plain"), Images(), None, config, tmp_path / "run", cpu=True)
    assert not (tmp_path / "run").exists()


def test_a_small_model_of_any_mode_learns_the_same(tmp_path, capsys):
    """Keys and files fill up with the paper's fine-tuning; a resumed run keeps its own keys."""
    keys = {"epochs": 1, "batch_size": 8, "workers": 0, "tracker": "none", "repeats": 1, "lr": 0.05, "list_epochs": 1}
    configs, found = {"piad": keys | {"mode": "piad"}, "plain": write(tmp_path, keys | {"mode": "plain"})}, []
    for mode, config in configs.items():
        model, out = make_net("plain").extract(spec=SPEC, verbose=False), tmp_path / f"{mode}-run"
        found.append(stratavit.finetune(model, Images(), None, config, out, cpu=True))
        stratavit.finetune(copy.deepcopy(model), Images(), None, config, out, cpu=True, resume=True)
    expected = Recipe.from_dict(FINETUNING | keys).to_dict()
    assert all(model.provenance["finetune"]["recipe"] == expected for model in found)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in found), strict=True))
    assert "list_epochs" in capsys.readouterr().err


OTHER = {  # keys of the list
    "layer_drop": 0.3,
    "compensation": "full",
    "reduction": 0.5,
    "list_epochs": 7,
    "growths": 2,
    "head_dim_unit": 4,
    "mlp_units": 16,
    "objective": "label",
    "measure": "cost",
    "sampling": "sandwich",
    "proxy_images": 64,
    "list_source": "given",
    "axes": "both",
}


def test_every_key_of_the_list_is_reported_of_a_small_model():
    assert set(OTHER) == set(LIST_KEYS) - {"mode"}
    assert set(idle_keys(Recipe.from_dict(FINETUNING | OTHER), "small model", 7)) == set(OTHER)


IDLE = [
    ({"layer_drop": 0.3, "list_epochs": 7}, 7, ["layer_drop"]),
    ({"mode": "layerdrop", "layer_drop": 0.3}, 7, []),
    ({"mode": "weighted", "layer_drop": 0.3, "list_epochs": 7}, 7, ["layer_drop", "list_epochs"]),
    ({"mode": "plain", "sampling": "budget", "growths": 2}, 7, ["growths", "sampling"]),
    ({"mode": "channel", "sampling": "budget", "growths": 2}, 7, ["sampling"]),
    ({"sampling": "budget", "growths": 2, "distil": 0.5, "mixup": 0.1}, 7, []),
    ({"distil": 0.5, "mixup": 0.1, "cutmix": 0.5, "smoothing": 0.2}, 0, ["distil", "mixup", "cutmix", "smoothing"]),
    ({"ema_horizon": 0.1, "ema_decay": 0.5}, 7, ["ema_decay"]),
    ({"keep": "raw", "ema_horizon": 0.5, "ema_decay": 0.5}, 7, ["ema_decay", "ema_horizon"]),
]


@pytest.mark.parametrize(("keys", "classes", "idle"), IDLE)
def test_keys_that_a_mode_has_no_use_for(keys, classes, idle):
    assert idle_keys(Recipe(**keys), "default", classes) == idle


@pytest.mark.parametrize(("keys", "idle"), [(keys, idle) for keys, classes, idle in IDLE if classes and idle])
def test_and_it_has_none(keys, idle):
    """The run is the same without them."""
    usual, found = Recipe().to_dict(), []
    for given in (keys, keys | {key: usual[key] for key in idle}):
        changes = given | {"list_epochs": 1} if given.get("mode", "piad") == "piad" else given
        recipe = dataclasses.replace(ONE, accumulate=3, **changes)
        net = copy.deepcopy(make_net("plain"))
        found.append(stratavit.train_piad(net, Images(), None, recipe, proxy=make_batches(), cpu=True).state_dict())
    assert_same(*map(dict, found))
