"""Training: it teaches, it touches only what a prefix uses, and an interruption anywhere changes nothing."""

import copy
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from children import FOLDER
from helpers import CLASSES, make_batches, make_images, make_net, relative_error
from torch.utils.data import DataLoader, Subset, TensorDataset
from training_runs import TINY, CrashError, Images, alike, assert_same, crash, fresh, outcome, run, terminate, trainer

import stratavit
from stratavit import StrataViTError, SuperNet, demo
from stratavit.dropout_list.strata import Strata
from stratavit.tasks.piad import train_piad
from stratavit.tasks.piad_task import evaluations
from stratavit.training import augmentation, order, run_files
from stratavit.training.recipe import Recipe
from stratavit.training.task import SampledNetwork
from stratavit.utils.random_streams import stream


@pytest.fixture(autouse=True)
def _accelerate_anew():
    """Accelerate keeps a state per process; `trainer` below leaves one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted runs: method -> folder and network."""
    return {m: (f := tmp_path_factory.mktemp(m) / "run", run(f, m)) for m in ("default", "paper")}


# ---- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["default", "paper"])
def test_stopped_in_the_midst_of_an_epoch_and_resumed(tmp_path, finished, method):
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 9"):
        run(tmp_path / "run", method, Images(24 + 14, terminate))
    run(tmp_path / "run", method, resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(finished[method][0]))


def test_a_list_that_grows_within_epochs(tmp_path):
    """Three steps an epoch, three growths; an interruption between two changes nothing."""
    recipe = dataclasses.replace(TINY, growths=3)
    found, lengths = trainer(tmp_path / "watched", recipe), []
    uncut = found.net.macs(dict.fromkeys(found.net.elastic, 0)) / found.net.macs()
    for step in range(9):
        found.step = step
        found.begin_stage()
        lengths.append(len(found.task.entries))
        target = max(1 - recipe.reduction * min(step + 1, 6) / 6, uncut)
        assert found.task.smallest <= target
    assert lengths[0] < lengths[2] < lengths[5] == lengths[8]
    found.begin_stage()
    assert len(found.task.entries) == lengths[8]
    run(tmp_path / "whole", recipe=recipe)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 9"):
        run(tmp_path / "run", data=Images(24 + 14, terminate), recipe=recipe)
    run(tmp_path / "run", recipe=recipe, resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("mode", ["piad", "weighted", "plain"])
def test_training_along_the_list_that_the_network_came_with(tmp_path, mode):
    recipe = dataclasses.replace(TINY, list_source="given", mode=mode, reduction=0.6)
    came_with = fresh(stratified=True).strata.entries
    net = run(tmp_path / "given", recipe=recipe)
    assert net.strata.entries == came_with[: len(net.strata)]
    dropped = 1 - net.macs(net.strata.spec(len(net.strata))) / net.macs()
    assert recipe.reduction <= dropped < 1


def test_a_given_list_is_released_by_stages_and_kept_when_resumed(tmp_path):
    recipe = dataclasses.replace(TINY, list_source="given")
    run(tmp_path / "alone", recipe=recipe)
    lengths = [row["entries"] for row in outcome(tmp_path / "alone")[1] if row["kind"] == "epoch"]
    assert 0 < lengths[0] < lengths[1] == lengths[2]
    with pytest.raises(CrashError):
        run(tmp_path / "again", data=Images(40, crash), recipe=recipe)
    run(tmp_path / "again", recipe=recipe, resume=True)
    assert_same(outcome(tmp_path / "again"), outcome(tmp_path / "alone"))


def test_what_a_given_list_lacks_is_measured(tmp_path):
    net, recipe = fresh(stratified=True), dataclasses.replace(TINY, list_source="given", reduction=0.6)
    short = net.strata.entries[:3]
    net.strata = Strata(net.sites, short)
    train_piad(net, Images(), None, recipe, None, proxy=make_batches(), cpu=True)
    assert net.strata.entries[:3] == short
    assert net.macs(net.strata.spec(len(net.strata))) <= (1 - recipe.reduction) * net.macs()


def test_no_list_to_go_by():
    net = fresh()
    with pytest.raises(StrataViTError, match=r"list_source 'given' needs a network with a dropout list .* stratify"):
        train_piad(net, Images(), None, dataclasses.replace(TINY, list_source="given"), proxy=make_batches(), cpu=True)


def test_crashed_at_random_moments_and_resumed(tmp_path, finished):
    """Nothing is saved at the moment of a crash; each time the run goes back to the last state."""
    recipe = dataclasses.replace(TINY, save_steps=2)
    moments, crashes = random.Random(0), 0
    while True:
        try:
            data = Images(moments.randrange(8, 40), crash)
            run(tmp_path / "run", data=data, recipe=recipe, resume=crashes > 0)
            break
        except CrashError:
            crashes += 1
    assert crashes >= 2
    state, *rest = outcome(tmp_path / "run")
    expected, *expected_rest = outcome(finished["default"][0])
    assert_same({**state, "recipe": 0}, {**expected, "recipe": 0})
    assert_same(rest, expected_rest)


def test_a_resumed_run_may_change_what_has_no_effect(tmp_path, finished):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", data=Images(30, terminate))
    run(tmp_path / "run", recipe=dataclasses.replace(TINY, workers=1, log_steps=1, save_steps=1), resume=True)
    assert_same(outcome(tmp_path / "run")[1:], outcome(finished["default"][0])[1:])


def test_a_crash_while_the_state_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    run_files.write_state(tmp_path, {"step": 1})

    def half(state, file):
        file.write(b"half a state")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(stratavit.ArtifactError, match="No space left"):
        run_files.write_state(tmp_path, {"step": 2})
    assert run_files.read_state(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_run_may_be_resumed(tmp_path, finished):
    before = outcome(finished["default"][0])
    net = run(finished["default"][0], resume=True)
    assert_same(outcome(finished["default"][0]), before)
    assert_same(net.model.state_dict(), finished["default"][1].model.state_dict())


def test_worker_processes_change_nothing(tmp_path, finished):
    recipe = dataclasses.replace(TINY, workers=2)
    run(tmp_path / "run", recipe=recipe)
    assert_same(outcome(tmp_path / "run")[1:], outcome(finished["default"][0])[1:])


def test_generators_handlers_and_drop_path_are_put_back(tmp_path):
    net = fresh()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(CrashError):
        train_piad(net, Images(10, crash), None, TINY, tmp_path / "run", proxy=make_batches(), cpu=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in net.model.blocks)


# ---- what a run gives ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["default", "paper"])
def test_what_a_run_leaves(finished, method):
    folder, net = finished[method]
    names = {"state.pt", "log.jsonl", "model.safetensors", "moments.safetensors", "stratavit.json", "config.json"}
    assert {path.name for path in folder.iterdir()} == names | {"curve.csv", "curve.png", "history.png"}
    assert [epoch for epoch, _ in evaluations(folder)] == [2, 3]
    assert evaluations(folder)[-1][1] == stratavit.evaluation.curve_points.read_csv(folder / "curve.csv")
    assert (folder / "history.png").read_bytes()[:4] == b"\x89PNG"
    assert timm.create_model(f"local-dir:{folder}", pretrained=True)
    loaded = SuperNet.load(folder)
    assert loaded.method == method
    assert loaded.compensation == ("none" if method == "paper" else "mean")
    assert loaded.strata.entries == net.strata.entries
    assert not net.training
    images, spec = make_images(2, seed=9), loaded.spec(macs=0.5)
    with torch.no_grad():
        assert torch.equal(loaded(images, spec), net(images, spec))
        assert torch.allclose(loaded.extract(spec=spec, verbose=False)(images), net(images, spec), atol=1e-5)
    log = run_files.Journal(folder / "log.jsonl").rows()
    assert [(row["kind"], row["epoch"]) for row in log] == [
        *[("epoch", 1), ("epoch", 2), ("eval", 2)],
        *[("epoch", 3), ("eval", 3)],
    ]
    assert net.provenance["train"]["recipe"] == TINY.to_dict()


def test_what_is_stale_is_dropped(finished):
    net = finished["default"][1]
    assert make_net("plain").elastic["blocks.0.attn"].moments is not None
    assert net.final_mean is None
    assert all(module.moments is None and module.crossed == () for module in net.elastic.values())


def test_means_belong_to_the_weights_that_are_kept(finished):
    net = copy.deepcopy(finished["default"][1])
    kept = {name: module.channel_mean.clone() for name, module in net.elastic.items()}
    statistics = stratavit.calibration.statistics.collect(net.model, make_batches(), scatter="none")
    for name, mean in kept.items():
        assert torch.equal(mean, statistics[name].channel_mean.to(mean))


def test_averaged_weights_are_kept_unless_told_otherwise(tmp_path, finished):
    state = run_files.read_state(finished["default"][0])
    assert_same(dict(finished["default"][1].model.state_dict()), dict(state["ema"]))
    raw = run(tmp_path / "raw", recipe=dataclasses.replace(TINY, keep="raw"))
    assert_same(dict(raw.model.state_dict()), dict(state["weights"]))
    assert not torch.equal(state["ema"]["head.weight"], state["weights"]["head.weight"])


@pytest.mark.parametrize(
    "changes", [{"sampling": "sandwich"}, {"sampling": "budget"}, {"mode": "plain"}, {"clip": 0.1}]
)
def test_options_run(tmp_path, changes):
    net = run(tmp_path / "run", recipe=dataclasses.replace(TINY, **changes))
    assert net.macs(net.strata.spec(len(net.strata))) <= (1 - TINY.reduction) * net.macs() or not any(
        net.strata.spec(len(net.strata)).values()
    )


@pytest.mark.parametrize("mode", ["plain", "channel", "weighted", "layerdrop", "piad"])
def test_what_the_arms_draw(tmp_path, mode):
    found = trainer(tmp_path, dataclasses.replace(TINY, mode=mode, list_epochs=1))
    found.begin_stage()
    specs = [one.spec for seed in range(300) for one in found.task.draw(stream(seed))]
    full = {site.name: site.width for site in found.net.sites}
    listed = {found.task.strata.spec(position) for position in range(len(found.task.entries) + 1)}
    assert any(0 in spec.values() for spec in specs) == (mode in ("layerdrop", "piad"))
    assert (set(specs) == {stratavit.Spec(full)}) == (mode == "plain")
    assert set(specs) <= listed if mode == "piad" else len(set(specs)) > 40 or mode == "plain"
    assert all(width in site.steps for spec in specs for site in found.net.sites for width in [spec[site.name]])
    assert bool(found.task.entries) == (mode not in ("plain", "channel"))


def test_units_of_the_recipe(tmp_path):
    net = run(tmp_path / "run", recipe=dataclasses.replace(TINY, head_dim_unit=4, mlp_units=8))
    loaded = SuperNet.load(tmp_path / "run")
    assert net.units == loaded.units == (4, 8)
    assert loaded.strata.entries == net.strata.entries
    ends = {site.name: set(site.steps) for site in net.sites}
    assert ends["blocks.0.attn"] == {0, 4, 8, 12, 16}
    assert ends["blocks.0.mlp"] == set(range(0, 65, 8))
    assert all(entry.width in ends[entry.site] for entry in net.strata.entries)


def test_proxy_images_are_taken_from_the_training_data(tmp_path):
    """They are augmented; yet a run depends on its seed alone, and one that is resumed takes its own recipe."""
    recipe, held_out = dataclasses.replace(TINY, proxy_images=8), make_batches()
    torch.manual_seed(1)
    stratavit.train_piad(fresh(), Images(), held_out, recipe, tmp_path / "whole", cpu=True)
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        stratavit.train_piad(fresh(), Images(60, terminate), held_out, recipe, tmp_path / "run", cpu=True)
    torch.manual_seed(3)
    stratavit.train_piad(fresh(), Images(), held_out, {"workers": 1}, tmp_path / "run", resume=True, cpu=True)
    assert_same(outcome(tmp_path / "run")[1:], outcome(tmp_path / "whole")[1:])


def test_mixed_precision_with_everything_on_and_resumed(tmp_path):
    changes = {"precision": "bf16", "distil": 0.5, "sampling": "sandwich", "clip": 1.0}
    recipe = dataclasses.replace(TINY, **changes)
    run(tmp_path / "whole", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", recipe=recipe, data=Images(30, terminate))
    run(tmp_path / "run", recipe=recipe, resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    net = run(tmp_path / "other", recipe=dataclasses.replace(TINY, precision="no"))  # chosen anew in one process
    assert all(p.dtype is torch.float32 for p in net.parameters())


def test_full_compensation_in_training(tmp_path):
    """Moments are measured anew, serve while training, survive interruptions, and are saved with the result."""
    recipe = dataclasses.replace(TINY, compensation="full", precision="bf16")
    net = run(tmp_path / "whole", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", recipe=recipe, data=Images(30, terminate))
    run(tmp_path / "run", recipe=recipe, resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    loaded = SuperNet.load(tmp_path / "run")
    assert loaded.compensation == "full"
    images, spec = make_images(2, seed=9), loaded.spec(macs=0.5)
    with torch.no_grad():
        assert torch.allclose(loaded.extract(spec=spec, verbose=False)(images), net(images, spec), atol=1e-5)
    for name, module in loaded.elastic.items():
        assert torch.equal(module.moments.factor, net.elastic[name].moments.factor)
        found = stratavit.calibration.statistics.collect(net.model, make_batches(), "auto", "none", token_weight=0.5)[
            name
        ]
        _, moments = stratavit.calibration.contraction.moments_of(net.elastic[name], found)
        assert relative_error(module.moments.factor, moments.factor) < 1e-5
    with pytest.raises(StrataViTError, match="not 'paper'"):
        run(tmp_path / "paper", "paper", recipe=recipe)


def test_moments_of_channels_as_they_are():
    """Measured again right after contraction they are those that contraction computed."""
    for family in ("plain", "layer_scale", "odd_widths"):
        net = make_net(family)
        found = stratavit.calibration.statistics.collect(net.model, make_batches(), "auto", "none", token_weight=0.5)
        for name, module in net.elastic.items():
            mean, moments = stratavit.calibration.contraction.moments_of(module, found[name])
            assert relative_error(mean.float(), module.channel_mean) < 1e-4
            assert (
                relative_error(moments.factor @ moments.factor.T, module.moments.factor @ module.moments.factor.T)
                < 1e-3
            )
            assert moments.energy == pytest.approx(module.moments.energy, rel=1e-3)


def test_smaller_prefixes_learn_from_the_full_network(tmp_path):
    found = trainer(tmp_path, dataclasses.replace(TINY, distil=1.0, accumulate=1, drop_path=0.0, mixup=0.0, cutmix=0.0))
    small, full = found.net.resolve(WIDTHS), found.net.resolve(None)
    found.draw = lambda number: [SampledNetwork(spec, found.net.macs(spec)) for spec in (full, small)]
    targets, learn = [], found.learn
    found.learn = lambda images, target, *rest: (targets.append(target), learn(images, target, *rest))
    images, labels = make_batches()[1]
    with torch.no_grad():
        answer = found.net(images).softmax(dim=1)
    found.update([(images, labels)])
    assert torch.equal(targets[0], labels)
    assert torch.allclose(targets[1], answer, atol=1e-6)


def test_terminated_with_all_its_workers(tmp_path):
    """A scheduler signals the whole group: the workers must not die before the state is saved."""
    script = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import dataclasses, os, signal, threading, training_runs as t\n"
        "os.setpgrp()\n"
        "before = t.Trainer.update\n"
        "def update(self, batches):\n"
        "    if self.step == 3:\n"
        "        os.killpg(0, signal.SIGTERM)\n"
        "    before(self, batches)\n"
        "t.Trainer.update = update\n"
        f"t.run({str(tmp_path / 'run')!r}, recipe=dataclasses.replace(t.TINY, workers=2, accumulate=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "stopped after step 4 of 18" in done.stderr, done.stderr[-2000:]
    assert run_files.read_state(tmp_path / "run")["step"] == 4


def test_a_stop_before_an_evaluation_is_not_lost(tmp_path):
    """Asked in the last step of an epoch that is evaluated: nothing is evaluated, and all steps are there."""
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6 of 9"):
        run(tmp_path / "run", data=Images(48, terminate))
    state = run_files.read_state(tmp_path / "run")
    assert (state["step"], state["ended"]) == (6, 1)


def test_more_growths_than_steps_are_refused(tmp_path):
    with pytest.raises(StrataViTError, match=r"growths \(4\) must not exceed the 3 steps"):
        run(tmp_path / "run", recipe=dataclasses.replace(TINY, growths=4))


@pytest.mark.parametrize("form", ["recipe", "mapping", "file"])
def test_forms_of_a_recipe_and_of_held_out_images(tmp_path, form):
    values = {k: v for k, v in TINY.to_dict().items() if v != getattr(Recipe(), k)} | {"epochs": 1, "list_epochs": 1}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    config = {"recipe": Recipe(**values), "mapping": values, "file": tmp_path / "recipe.toml"}[form]
    held_out = TensorDataset(*(torch.cat(side) for side in zip(*make_batches(), strict=True)))
    stratavit.train_piad(fresh(), Images(), held_out, config, tmp_path / "run", proxy=make_batches(), cpu=True)
    rows = run_files.Journal(tmp_path / "run" / "log.jsonl").rows()
    assert rows[-1]["points"][0]["n"] == 12


def test_the_full_network_teaches():
    """The labels' part of the target is smoothed, the answer's is not; the loss smooths neither again."""
    target = augmentation.Target(dataclasses.replace(TINY, mixup=0.0, cutmix=0.0, smoothing=0.3), 3)
    labels, answer = torch.tensor([0, 2]), torch.randn(2, 3)
    assert torch.allclose(target.taught(labels, answer, 0.0), 0.7 * torch.eye(3)[labels] + 0.1)
    logits, soft = torch.randn(2, 3), target.taught(labels, answer, 1.0)
    assert torch.allclose(target.loss(logits, soft), -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean())
    assert torch.allclose(target.loss(logits, labels), target.loss(logits, target.taught(labels, answer, 0.0)))
    assert torch.allclose(target.taught(labels, answer, 1.0), answer.softmax(dim=1))
    assert torch.allclose(target.taught(labels, answer, 0.25).sum(dim=1), torch.ones(2))


def test_a_tracker_writes(tmp_path):
    run(tmp_path / "run", recipe=dataclasses.replace(TINY, epochs=1, list_epochs=1, tracker="tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_training_raises_the_half_size_network(tmp_path):
    """The same epochs from the same weights: PIAD ends above plain training at half the MACs, by standard errors."""
    torch.manual_seed(0)
    images, test = demo.digits()
    model = demo.small_vit()
    demo.train(model, images, 3, torch.device("cpu"))
    proxy = DataLoader(Subset(images, range(128)), 128)
    base = SuperNet(model, demo.DATA_CONFIG).contract(proxy)
    off = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "drop_path": 0.0}
    recipe = Recipe(
        epochs=4, list_epochs=2, batch_size=64, lr=4e-3, repeats=1, ema_horizon=0.1, workers=0, tracker="none", **off
    )
    top1 = {}
    for mode in ("piad", "plain"):
        net = copy.deepcopy(base)
        train_piad(net, images, None, dataclasses.replace(recipe, mode=mode), tmp_path / mode, proxy=proxy, cpu=True)
        top1[mode] = stratavit.evaluate(net, DataLoader(test, 360), net.spec(macs=0.5)).top1
    error = 100 * (0.1 * 0.9 / 360) ** 0.5
    assert top1["piad"] > top1["plain"] + 2 * error, top1


# ---- one step -----------------------------------------------------------------------------------


def stepped(tmp_path, widths, **changes):
    """Weights before and after one step at a prefix, and the gradients of the step."""
    found = trainer(tmp_path, dataclasses.replace(TINY, accumulate=1, clip=0.0, **changes), "paper")
    spec = found.net.resolve(widths)
    found.draw = lambda number: [SampledNetwork(spec, found.net.macs(spec))]
    before = {name: p.detach().clone() for name, p in found.net.model.named_parameters()}
    gradients, step = {}, found.optimiser.step

    def watched():
        gradients.update({name: p.grad for name, p in found.net.model.named_parameters()})
        step()

    found.optimiser.step = watched
    found.model.train()
    images, labels = make_batches()[1]
    found.update([(images, labels)])
    return found, before, dict(found.net.model.named_parameters()), gradients


WIDTHS = {"blocks.0.attn": 8, "blocks.0.mlp": 10, "blocks.1.attn": 0}


def skipped(name):
    """Whether the prefix `WIDTHS` skips the whole weight."""
    return name.startswith(("blocks.1.attn.", "blocks.1.norm1."))


def cut_rows(name, shape):
    """Which entries of a weight the prefix `WIDTHS` cuts."""
    cut = torch.zeros(shape, dtype=torch.bool)
    if name.startswith("blocks.0.attn.qkv"):
        cut.view(3, 2, 16, *shape[1:])[:, :, 8:] = True
    if name == "blocks.0.attn.proj.weight":
        cut.view(32, 2, 16)[:, :, 8:] = True
    if name.startswith("blocks.0.mlp.fc1"):
        cut[10:] = True
    if name == "blocks.0.mlp.fc2.weight":
        cut[:, 10:] = True
    if skipped(name):
        cut[:] = True
    return cut


def test_only_kept_slices_get_gradients(tmp_path):
    _, _, _, gradients = stepped(tmp_path, WIDTHS)
    for name, gradient in gradients.items():
        if skipped(name):
            assert gradient is None, name
        else:
            cut = cut_rows(name, gradient.shape)
            assert not gradient[cut].any(), name
            assert gradient[~cut].any(), name


def test_a_step_leaves_skipped_weights_exactly_unchanged(tmp_path):
    _, before, after, _ = stepped(tmp_path, WIDTHS, weight_decay=0.0)
    for name, old in before.items():
        cut = cut_rows(name, old.shape)
        assert torch.equal(after[name][cut], old[cut]), name
        assert not torch.equal(after[name], old) or cut.all(), name


def test_decay_reaches_cut_slices_but_not_skipped_modules(tmp_path):
    found, before, after, _ = stepped(tmp_path, WIDTHS, weight_decay=0.5)
    factor = 1 - found.rate * 0.5
    for name, old in before.items():
        cut = cut_rows(name, old.shape)
        decays = old.dim() > 1 and not skipped(name)
        assert torch.allclose(after[name][cut], old[cut] * (factor if decays else 1.0), rtol=1e-6), name


def test_accumulated_gradients_are_the_mean_over_batches(tmp_path):
    recipe = dataclasses.replace(TINY, drop_path=0.0, mixup=0.0, cutmix=0.0)
    found = trainer(tmp_path, recipe, "paper")
    gradients, batches = {}, [tuple(t[:4] for t in batch) for batch in make_batches((5, 7))]
    reference = fresh("paper")
    step = found.optimiser.step
    found.optimiser.step = lambda: (
        gradients.update({n: p.grad.clone() for n, p in found.net.model.named_parameters()}),
        step(),
    )
    found.model.train()
    found.update(batches)
    for images, labels in batches:
        (torch.nn.functional.cross_entropy(reference(images), labels, label_smoothing=0.1) / 2).backward()
    for name, parameter in reference.model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6), name


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path):
    data = Images()
    data.images[3] = float("nan")
    with pytest.raises(StrataViTError, match=r"loss is nan at step [0-2] \(prefix \d+, \d+% of MACs, learning rate"):
        run(tmp_path / "run", data=data)
    state = run_files.read_state(tmp_path / "run")
    assert state["step"] == 0
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_out_must_be_free(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(stratavit.ArtifactError, match="is not empty"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(stratavit.ArtifactError, match="holds no interrupted training"):
        run(tmp_path / "none", resume=True)
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(stratavit.ArtifactError, match="is damaged"):
        run(tmp_path, resume=True)
    torch.save({"format": "other"}, tmp_path / "state.pt")
    with pytest.raises(stratavit.ArtifactError, match="not a training state"):
        run(tmp_path, resume=True)


def test_a_resumed_run_keeps_its_recipe_model_and_data(finished, tmp_path):
    folder = finished["default"][0]
    with pytest.raises(StrataViTError, match=r"trained with lr = 0.05; a resumed run cannot make it 1.0"):
        run(folder, recipe=dataclasses.replace(TINY, lr=1.0), resume=True)
    with pytest.raises(StrataViTError, match="kind = default; now it is paper"):
        run(folder, "paper", resume=True)
    with pytest.raises(StrataViTError, match="images = 24; now it is 16"):
        run(folder, data=Subset(Images(), range(16)), resume=True)
    other = copy.deepcopy(make_net("odd_widths"))
    with pytest.raises(StrataViTError, match="state of another model"):
        train_piad(other, Images(), None, None, folder, proxy=make_batches(), resume=True, cpu=True)


def test_too_few_images_or_no_labels(tmp_path):
    with pytest.raises(StrataViTError, match="7 images are fewer than the 8 of one step"):
        run(tmp_path / "few", data=Subset(Images(), range(7)))
    with pytest.raises(StrataViTError, match="gives no labels"):
        run(tmp_path / "none", data=TensorDataset(make_images(24)))


@pytest.mark.parametrize(("module", "tracker"), [("accelerate", "none"), ("tensorboard", "tensorboard")])
def test_missing_packages_are_named(tmp_path, monkeypatch, module, tracker):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StrataViTError, match=r"pip install 'stratavit\[train\]'"):
        run(tmp_path / "run", recipe=dataclasses.replace(TINY, tracker=tracker))
    assert not (tmp_path / "run").exists()


# ---- order and augmentation ---------------------------------------------------------------------


def test_processes_share_an_epoch():
    found = order.Order(50, batch_size=4, processes=3, accumulate=2, repeats=1, seed=0)
    assert found.steps == 2
    keys = [key for process in range(3) for batch in found.batches(1, process) for key in batch]
    assert len({index for _, _, index in keys}) == len(keys) == 48
    assert sorted(place for _, place, _ in keys) == list(range(48))
    assert found.batches(1, 2, first_step=1) == found.batches(1, 2)[2:]
    assert found.indices(0).tolist() != found.indices(1).tolist()


def test_repeated_augmentation():
    found = order.Order(60, batch_size=4, processes=1, accumulate=1, repeats=3, seed=0)
    indices = found.indices(0)
    assert len(indices) == 60
    assert torch.unique(indices, return_counts=True)[1].tolist() == [3] * 20


def test_mixing_needs_no_alpha_to_smooth():
    recipe = dataclasses.replace(TINY, mixup=0.0, cutmix=0.0, smoothing=0.1)
    images, labels = make_batches()[1]
    logits = torch.randn(4, CLASSES)
    plain, mixing = augmentation.Target(recipe, CLASSES), augmentation.Target(TINY, CLASSES)
    same, target = plain.mix(images, labels)
    assert torch.equal(same, images)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(plain.loss(logits, target), expected)
    _, soft = mixing.mix(images.clone(), labels)
    assert torch.allclose(soft.sum(dim=1), torch.ones(4))
    assert torch.allclose(mixing.loss(logits, soft), -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean())


# ---- two processes ------------------------------------------------------------------------------

_SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import json, pathlib
import training_runs as t
out = pathlib.Path({out!r})
drawn, original = [], t.Trainer.draw
def watched(self, number):
    found = original(self, number)
    drawn.append([one.position for one in found])
    return found
t.Trainer.draw = watched
weights = {{}}
finish = t.Trainer.finish
def seen(self):
    weights.update(sums=[p.double().abs().sum().item() for p in self.net.parameters()], rank=self.rank)
    finish(self)
t.Trainer.finish = seen
t.run(out / "run")
(out / f"rank{{weights['rank']}}.json").write_text(json.dumps({{**weights, "drawn": drawn}}))
t.alike(out / "alike")
"""


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes(tmp_path):
    """Finite losses, equal weights on both, their own draws."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(tests=str(FOLDER), out=str(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        str(script),
    ]
    paths = [str(Path(stratavit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-9000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["sums"] == ranks[1]["sums"]
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    log = run_files.Journal(tmp_path / "run" / "log.jsonl").rows()
    assert all(np.isfinite(row["loss"]) for row in log if row["kind"] == "epoch")
    assert len(log[-1]["points"]) == len({point["asked"] for point in log[-1]["points"]}) > 1
    assert SuperNet.load(tmp_path / "run").provenance["train"]["processes"] == 2
    one, both = alike(tmp_path / "one"), SuperNet.load(tmp_path / "alike")
    assert both.strata.entries == one.strata.entries
    images = make_images(8, seed=9)
    for position in (0, len(one.strata) // 2, len(one.strata)):
        spec = one.strata.spec(position)  # logits: Adam blows up rounding where the gradient is 0 (the bias of k)
        with torch.no_grad():
            assert relative_error(both(images, spec), one(images, spec)) < 1e-3
