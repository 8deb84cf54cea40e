"""Nothing is silently other than it was asked for: rates, keys of a recipe, types that are timed, tolerances, specs."""

import copy
import dataclasses
import itertools
import os
import pickle
import stat
import sys

import pytest
import timm
import torch
from helpers import make_batches, make_model, make_net
from torch import nn
from training_runs import TINY, Images

import stratavit
from stratavit import Recipe, Setting, Spec, StrataViTError
from stratavit.evaluation import latency
from stratavit.files import folders
from stratavit.interop.export import FLOOR, TOLERANCE
from stratavit.training.optimizer import optimiser_and_schedule
from stratavit.training.recipe import FINETUNING, LIST_KEYS
from stratavit.training.teacher import Teacher
from stratavit.training.unused_keys import idle_keys

SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 0, "blocks.1.mlp": 20}
STUDENT = {"input_size": (3, 32, 32), "mean": (0,) * 3, "std": (1,) * 3}

# ---- teachers with counters -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["regnety_002", "resnet10t", "test_vit"])
def test_teachers_of_timm_teach(name):
    model = timm.create_model(name, num_classes=7)
    small = make_net("plain").extract(spec=SPEC, verbose=False)
    recipe = dataclasses.replace(TINY, distil=0.5, epochs=1, list_epochs=1)
    stratavit.finetune(small, Images(), None, recipe, cpu=True, teacher=model)
    assert small.provenance["finetune"]["recipe"]["distil"] == 0.5


def test_the_name_of_other_teachers_is_as_it_was():
    """A resumed run asks for the teacher that it began with."""
    import hashlib

    model, digest = make_model("plain"), hashlib.blake2b(digest_size=4)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert Teacher(model, STUDENT).name.endswith(digest.hexdigest())


# ---- rates ------------------------------------------------------------------------------------------------------

IMAGES = [1, 2, 8, 10, 11, 64, 512, 4096]


@pytest.mark.parametrize("images", IMAGES)
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


# ---- keys of a recipe -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("form", ["mapping", "file"])
def test_a_small_model_of_any_mode_learns_the_same(form, tmp_path, capsys):
    keys = {key: getattr(TINY, key) for key in ("epochs", "batch_size", "workers", "tracker", "repeats", "lr")}
    keys |= {"epochs": 1, "list_epochs": 1}
    found = []
    for mode in ("piad", "plain"):
        given = keys | {"mode": mode}
        config = {"mapping": given, "file": write(tmp_path, given), "recipe": Recipe(**given)}[form]
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
    from typing import get_args

    from stratavit.training.recipe import field_types

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


# ---- what is timed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16"])
def test_the_model_that_is_timed_is_in_eval_mode(dtype, training, monkeypatch):
    if dtype == "float64":
        with pytest.raises(StrataViTError):
            Setting(dtype=dtype)
        return
    seen = []

    class Witness(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            seen.append(self.training or self.norm.training)
            return self.norm(images)

    model = Witness().train(training)
    one = latency.runner(model, (3, 8, 8), Setting(dtype=dtype))
    assert len(seen) >= 2
    assert not any(seen)
    assert model.training == model.norm.training == training
    assert int(one.model.norm.num_batches_tracked) == 0


# ---- tolerances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_parity_does_not_depend_on_the_scale_of_the_outputs(format, scale, tmp_path, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    module = sys.modules["stratavit.interop.export"]
    model = make_model("plain").eval()
    with torch.no_grad():
        model.head.weight *= scale
        model.head.bias *= scale
    stratavit.export(model, tmp_path / "sound", format)
    name = {"onnx": "_run_onnx", "torch": "_run_program"}[format]
    run = getattr(module, name)

    def wrong(path):
        answer = run(path)
        return lambda images: answer(images) * 0.99

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(StrataViTError, match="differ"):
        stratavit.export(model, tmp_path / "wrong", format)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("error", "sound"), [(0.5, True), (0.0, True), (2.0, False), (float("nan"), False)])
def test_the_limit_is_that_of_every_image_by_itself(scale, error, sound):
    from stratavit.interop.export import _difference

    expected = torch.ones(3, 7)
    expected[0] *= 1000  # the logits of one image are no excuse for another's
    expected *= scale
    found = expected.clone()
    found[1, 2] += error * (TOLERANCE * scale + FLOOR)
    if sound:
        assert _difference(found, expected, "onnx", TOLERANCE) <= TOLERANCE * scale + FLOOR
    else:
        with pytest.raises(StrataViTError, match="differ"):
            _difference(found, expected, "onnx", TOLERANCE)


def test_outputs_that_are_all_zero():
    from stratavit.interop.export import _difference

    assert _difference(torch.zeros(2, 3), torch.zeros(2, 3), "torch", TOLERANCE) == 0
    with pytest.raises(StrataViTError, match="differ"):
        _difference(torch.full((2, 3), 1e-6), torch.zeros(2, 3), "torch", TOLERANCE)


# ---- specs ------------------------------------------------------------------------------------------------------

SPECS = [{}, {"a": 1}, {"a": {"qk": 8, "v": 4}, "b": 3}, {"b": {"qk": 0, "v": 0}}]
CHANGES = [
    lambda spec: spec.qk.update(a=5),
    lambda spec: spec.qk.__setitem__("a", 5),
    lambda spec: spec.qk.clear(),
    lambda spec: setattr(spec, "qk", {"a": 5}),
    lambda spec: setattr(spec, "_qk", {"a": 5}),
    lambda spec: setattr(spec, "_widths", {"a": 5}),
    lambda spec: setattr(spec, "new", 5),
    lambda spec: delattr(spec, "_widths"),
    lambda spec: spec.__setitem__("a", 5),
    lambda spec: spec.update(a=5),
]


@pytest.mark.parametrize("widths", SPECS)
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_spec_cannot_be_changed(widths, number):
    spec = Spec(widths)
    before, qk = dict(spec), dict(spec.qk)
    with pytest.raises((AttributeError, TypeError)):
        CHANGES[number](spec)
    assert (dict(spec), dict(spec.qk)) == (before, qk)


@pytest.mark.parametrize("widths", SPECS)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, *(lambda spec, p=p: pickle.loads(pickle.dumps(spec, p)) for p in range(2, 6))],
)
def test_copies_of_a_spec_are_specs(widths, copied):
    spec = Spec(widths)
    other = copied(spec)
    assert type(other) is Spec
    assert other == spec
    assert hash(other) == hash(spec)
    assert dict(other.qk) == dict(spec.qk)
    with pytest.raises(AttributeError):
        other.qk = {}


def test_specs_that_older_releases_pickled():
    spec = Spec.__new__(Spec)
    spec.__setstate__({"_widths": {"a": 4}, "qk": {"a": 8}})
    assert (dict(spec), dict(spec.qk)) == ({"a": 4}, {"a": 8})


# ---- permissions ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask_which_is_left_alone(umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)  # which would change it for all threads
            folders.write_folder(tmp_path / "folder", lambda path: (path / "a").write_text("x"))
            folders.write_file(tmp_path / "file", b"x")
    finally:
        assert os.umask(before) == umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o777 & ~umask, "a": 0o666 & ~umask, "file": 0o666 & ~umask}
