"""Training: it teaches, it touches only what a prefix uses, and an interruption anywhere changes nothing."""

import copy
import dataclasses
import json
import random
import signal

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers import CLASSES, PLAN, make_batches, make_images, make_net, relative_error
from torch.utils.data import DataLoader, Subset, TensorDataset
from training_runs import (
    CALM,
    ONE,
    TINY,
    CrashError,
    Images,
    assert_same,
    crash,
    fresh,
    interrupted,
    merging,
    names,
    outcome,
    rows,
    run,
    terminate,
    trainer,
)

import stratavit
from stratavit import StrataViTError, SuperNet
from stratavit.calibration import statistics
from stratavit.calibration.moments import moments_of
from stratavit.dropout_list.strata import Strata
from stratavit.evaluation.curve_points import with_before
from stratavit.reports.curve import curve
from stratavit.tasks import demo
from stratavit.tasks.piad import train_piad
from stratavit.tasks.piad_task import evaluations
from stratavit.training import augmentation, order, run_files
from stratavit.training.recipe import Recipe
from stratavit.training.task import SampledNetwork
from stratavit.utils.random_streams import stream

CASES = {
    "default": TINY,
    "paper": TINY,
    "everything": dataclasses.replace(TINY, precision="bf16", distil=0.5, sampling="sandwich", clip=1.0, growths=3),
    "tokens": dataclasses.replace(TINY, list_source="given", axes="both", sampling="sandwich"),
    "full": dataclasses.replace(TINY, compensation="full", precision="bf16", list_source="given", sampling="budget"),
}


def method_of(case):
    return case if case == "paper" else "default"


@pytest.fixture(autouse=True)
def _reset_accelerate():
    """Accelerate keeps a state per process; `trainer` below leaves one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted runs: case -> folder and network."""
    folders = {case: tmp_path_factory.mktemp(case) / "run" for case in CASES}
    return {case: (folders[case], run(folders[case], method_of(case), recipe=CASES[case])) for case in CASES}


def same_at_half(net, loaded):
    """Whether two super-networks compute the same at half the MACs, as does what is extracted from them."""
    images, spec = make_images(2, seed=9), loaded.spec(macs=0.5)
    with torch.no_grad():
        small = loaded.extract(spec=spec, verbose=False)(images)
        return torch.equal(loaded(images, spec), net(images, spec)) and torch.allclose(
            small, net(images, spec), atol=1e-5
        )


# ---- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_stopped_in_the_midst_of_an_epoch_and_resumed(tmp_path, finished, case):
    def train(data, resume):
        return run(tmp_path / "run", method_of(case), data, CASES[case], resume)

    _, said = interrupted(train)
    assert "stopped after step 5 of 9" in said
    assert_same(outcome(tmp_path / "run"), outcome(finished[case][0]))


def test_crashed_at_random_moments_and_resumed(tmp_path, finished):
    """Nothing is saved at the moment of a crash; each time the run goes back to the last state."""
    recipe, moments, crashes = dataclasses.replace(TINY, save_steps=2), random.Random(0), 0
    while True:
        try:
            data = Images(moments.randrange(8, 40), crash)
            run(tmp_path / "run", data=data, recipe=recipe, resume=crashes > 0)
            break
        except CrashError:
            crashes += 1
    assert crashes >= 2
    (state, *rest), (expected, *expected_rest) = outcome(tmp_path / "run"), outcome(finished["default"][0])
    assert_same([{**state, "recipe": 0}, *rest], [{**expected, "recipe": 0}, *expected_rest])


def test_a_finished_run_may_be_resumed(finished):
    folder, trained = finished["default"]
    before = outcome(folder)
    net = run(folder, resume=True)
    assert_same(outcome(folder), before)
    assert_same(net.model.state_dict(), trained.model.state_dict())


def test_a_stop_before_an_evaluation_is_not_lost(tmp_path):
    """Asked in the last step of an epoch that is evaluated: nothing is evaluated, and all steps are there."""
    with pytest.raises(KeyboardInterrupt, match="step 6 of 9"):
        run(tmp_path / "run", data=Images(48, terminate))
    state = run_files.read_state(tmp_path / "run")
    assert (state["step"], state["ended"]) == (6, 1)


def test_proxy_images_are_taken_from_the_training_data(tmp_path):
    """They are augmented; yet a run depends on its seed alone, also if it is resumed with keys that have no effect."""
    recipe = dataclasses.replace(TINY, epochs=2, list_epochs=1, proxy_images=8)

    def train(data, resume, out="run"):
        torch.manual_seed(len(out) + resume)
        config = {"workers": 2, "log_steps": 1, "save_steps": 1} if resume else recipe
        return train_piad(fresh(), data, make_batches(), config, tmp_path / out, resume=resume, cpu=True)

    train(Images(), False, "uncut")
    interrupted(train, at=50)
    assert_same(outcome(tmp_path / "run")[1:], outcome(tmp_path / "uncut")[1:])


def test_generators_handlers_and_drop_path_are_put_back(tmp_path):
    def found():
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        return handlers, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    net, before = fresh(), found()
    with pytest.raises(CrashError):
        train_piad(net, Images(10, crash), None, TINY, tmp_path / "run", proxy=make_batches(), cpu=True)
    assert found() == before
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in net.model.blocks)


# ---- what a run leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["default", "paper", "full"])
def test_what_a_run_leaves(finished, case):
    folder, net = finished[case]
    written = {"state.pt", "log.jsonl", "model.safetensors", "moments.safetensors", "stratavit.json", "config.json"}
    assert names(folder) == written | {"curve.csv", "curve.png", "history.png"}
    assert [epoch for epoch, _ in evaluations(folder)] == [0, 2, 3]
    shown = with_before(evaluations(folder)[-1][1], evaluations(folder)[0][1])
    assert shown == stratavit.evaluation.curve_points.read_csv(folder / "curve.csv")
    assert shown[0].before is not None
    assert (folder / "history.png").read_bytes()[:4] == b"\x89PNG"
    assert timm.create_model(f"local-dir:{folder}", pretrained=True)
    loaded = SuperNet.load(folder)
    assert loaded.method == method_of(case)
    assert loaded.compensation == {"paper": "none", "default": "mean", "full": "full"}[case]
    assert loaded.strata.entries == net.strata.entries
    assert not net.training
    assert same_at_half(net, loaded)
    kinds = [(row["kind"], row["epoch"]) for row in rows(folder)]
    assert kinds == [("eval", 0), ("epoch", 1), ("epoch", 2), ("eval", 2), ("epoch", 3), ("eval", 3)]
    assert net.provenance["train"]["recipe"] == CASES[case].to_dict()
    assert all(parameter.dtype is torch.float32 for parameter in net.parameters())


@pytest.mark.parametrize("case", ["default", "full"])
def test_means_and_moments_belong_to_the_weights_that_are_kept(finished, case):
    """Moments that do not serve, and the final mean, are stale and dropped."""
    net, full = copy.deepcopy(finished[case][1]), case == "full"
    found = statistics.collect(net.model, make_batches(), "auto", "none", token_weight=0.5 if full else None)
    assert make_net("plain").elastic["blocks.0.attn"].moments is not None
    assert net.final_mean is None
    for name, module in net.elastic.items():
        if full:
            mean, moments = moments_of(module, found[name])
            assert relative_error(module.moments.factor, moments.factor) < 1e-5
            assert relative_error(module.channel_mean, mean.to(module.channel_mean)) < 1e-5
        else:
            assert module.moments is None
            assert module.crossed == ()
            assert torch.equal(module.channel_mean, found[name].channel_mean.to(module.channel_mean))


def test_averaged_weights_are_kept_unless_the_recipe_says_raw(tmp_path, finished):
    state = run_files.read_state(finished["default"][0])
    assert_same(dict(finished["default"][1].model.state_dict()), dict(state["ema"]))
    raw = run(tmp_path / "raw", recipe=dataclasses.replace(TINY, keep="raw"))
    assert_same(dict(raw.model.state_dict()), dict(state["weights"]))
    assert not torch.equal(state["ema"]["head.weight"], state["weights"]["head.weight"])
    unaveraged = dataclasses.replace(TINY, ema_horizon=0.0, ema_decay=0.0)
    none, _ = interrupted(lambda data, resume: run(tmp_path / "none", data=data, recipe=unaveraged, resume=resume))
    assert_same(dict(none.model.state_dict()), dict(raw.model.state_dict()))


def test_the_network_as_it_came_is_the_first_row_of_the_curve(tmp_path):
    """With its own list and moments, which training then drops."""
    net = fresh(stratified=True)
    expected = curve(net, make_batches())
    train_piad(net, Images(), make_batches(), ONE, tmp_path / "run", proxy=make_batches(), cpu=True)
    assert evaluations(tmp_path / "run")[0] == (0, expected)
    assert len(expected) > 1


@pytest.mark.parametrize("method", ["default", "paper"])
@pytest.mark.parametrize("stratified", [True, False])
def test_the_default_recipe_learns_from_few_images(tmp_path, method, stratified, capsys):
    data = Images()
    batch = [(data.images, data.labels)]
    net = fresh(method, stratified)
    train_piad(net, data, batch, {"epochs": 4, "workers": 0, "tracker": "none", "lr": 0.01}, tmp_path / "run", cpu=True)
    (_, before), *_, (_, after) = evaluations(tmp_path / "run")
    assert after[0].loss < before[0].loss
    assert net.compensation == ("full" if method == "default" else "none")
    assert len(net.strata) > 0
    assert "nothing was learned" not in capsys.readouterr().err


def test_a_recipe_from_a_file_and_held_out_images_as_a_data_set(tmp_path):
    values = {key: value for key, value in ONE.to_dict().items() if value != getattr(Recipe(), key)}
    values["base"] = "paper"
    (tmp_path / "recipe.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    held_out = TensorDataset(*(torch.cat(side) for side in zip(*make_batches(), strict=True)))
    config, out = tmp_path / "recipe.toml", tmp_path / "run"
    net = train_piad(fresh(), Images(), held_out, config, out, proxy=make_batches(), cpu=True)
    assert net.provenance["train"]["recipe"] == ONE.to_dict()
    assert rows(out)[-1]["points"][0]["n"] == 12


# ---- the list -----------------------------------------------------------------------------------


def test_a_list_that_grows_within_epochs(tmp_path):
    """Three steps an epoch, three growths."""
    recipe = dataclasses.replace(TINY, growths=3)
    found, lengths = trainer(tmp_path, recipe), []
    uncut = found.net.macs(dict.fromkeys(found.net.elastic, 0)) / found.net.macs()
    for step in range(9):
        found.step = step
        found.begin_stage()
        lengths.append(len(found.task.entries))
        assert found.task.facts()["smallest"] <= max(1 - recipe.reduction * min(step + 1, 6) / 6, uncut)
    assert lengths[0] < lengths[2] < lengths[5] == lengths[8]
    found.begin_stage()
    assert len(found.task.entries) == lengths[8]


@pytest.mark.parametrize("mode", ["piad", "plain"])
def test_training_along_the_list_that_the_network_came_with(tmp_path, mode):
    recipe = dataclasses.replace(ONE, list_source="given", mode=mode, reduction=0.6)
    net = run(tmp_path / "given", recipe=recipe)
    assert net.strata.entries == fresh(stratified=True).strata.entries[: len(net.strata)]
    assert recipe.reduction <= 1 - net.macs(net.strata.smallest()) / net.macs() < 1


def test_a_given_list_is_released_by_stages(finished):
    lengths = [row["entries"] for row in rows(finished["full"][0]) if row["kind"] == "epoch"]
    assert 0 < lengths[0] < lengths[1] == lengths[2]


def test_what_a_given_list_lacks_is_measured():
    net, recipe = fresh(stratified=True), dataclasses.replace(ONE, list_source="given", reduction=0.6)
    short = net.strata.entries[:3]
    net.strata = Strata(net.sites, short)
    train_piad(net, Images(), None, recipe, None, proxy=make_batches(), cpu=True)
    assert net.strata.entries[:3] == short
    assert net.macs(net.strata.smallest()) <= (1 - recipe.reduction) * net.macs()


@pytest.mark.parametrize("mode", ["piad", "layerdrop"])
def test_what_the_list_must_keep_is_kept_in_training(mode):
    net = fresh().stratify(make_batches(), plan=PLAN, ignore=["blocks.0.*"], min_width=3)
    recipe = dataclasses.replace(ONE, list_source="progressive", mode=mode, reduction=0.99)
    train_piad(net, Images(), None, recipe, None, proxy=make_batches(), cpu=True)
    smallest = net.strata.smallest()
    assert dict(smallest) == {"blocks.0.attn": 16, "blocks.0.mlp": 64, "blocks.1.attn": 8, "blocks.1.mlp": 4}


def test_training_along_the_list_over_both_axes(finished):
    """Both lists stay as they came; what is drawn of the one over both axes merges tokens."""
    folder, net = finished["tokens"]
    assert net.joint_strata.entries == merging().joint_strata.entries
    assert net.strata.entries == merging().strata.entries
    assert SuperNet.load(folder).joint_strata.entries == net.joint_strata.entries
    (_, points), *_ = evaluations(folder)
    assert {point.axes for point in points} == {"both"}
    assert [point.macs for point in points if point.asked == "9/12"] == [net.macs(net.spec(macs=9 / 12, axes="both"))]


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
    net = run(tmp_path / "run", recipe=dataclasses.replace(ONE, head_dim_unit=4, mlp_units=8))
    loaded = SuperNet.load(tmp_path / "run")
    assert net.units == loaded.units == (4, 8)
    assert loaded.strata.entries == net.strata.entries
    ends = {site.name: set(site.steps) for site in net.sites}
    assert (ends["blocks.0.attn"], ends["blocks.0.mlp"]) == ({0, 4, 8, 12, 16}, set(range(0, 65, 8)))
    assert all(entry.width in ends[entry.site] for entry in net.strata.entries)


# ---- it teaches ---------------------------------------------------------------------------------


def test_training_raises_the_half_size_network():
    """The same epochs from the same weights: PIAD ends above plain training at half the MACs, by standard errors."""
    torch.manual_seed(0)
    images, test = demo.digits()
    model = demo.small_vit()
    demo.train(model, images, 3, torch.device("cpu"))
    proxy = DataLoader(Subset(images, range(128)), 128)
    base, top1 = SuperNet(model, demo.DATA_CONFIG).contract(proxy), {}
    options = {"epochs": 3, "list_epochs": 1, "batch_size": 64, "lr": 4e-3, "repeats": 1, "smoothing": 0.0, **CALM}
    recipe = Recipe(**options, ema_horizon=0.1, workers=0, tracker="none")
    for mode in ("piad", "plain"):
        net = copy.deepcopy(base)
        train_piad(net, images, None, dataclasses.replace(recipe, mode=mode), proxy=proxy, cpu=True)
        top1[mode] = stratavit.evaluate(net, DataLoader(test, 360), net.spec(macs=0.5)).top1
    error = 100 * (0.1 * 0.9 / 360) ** 0.5
    assert top1["piad"] > top1["plain"] + 2 * error, top1


def test_targets():
    """The labels' part of a taught target is smoothed, the teacher's is not; the loss smooths neither again."""
    labels, output, logits = torch.tensor([0, 2]), torch.randn(2, 3), torch.randn(2, 3)

    def cross_entropy(soft):
        return -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()

    target = augmentation.Target(dataclasses.replace(TINY, **CALM, smoothing=0.3), 3)
    smooth = 0.7 * torch.eye(3)[labels] + 0.1
    assert torch.allclose(target.taught(labels, output, 0.0), smooth)
    assert torch.allclose(target.taught(labels, output, 1.0), output.softmax(dim=1))
    assert torch.allclose(target.taught(labels, output, 0.25), 0.75 * smooth + 0.25 * output.softmax(dim=1))
    assert torch.allclose(target.loss(logits, labels), cross_entropy(smooth))
    assert torch.allclose(target.loss(logits, smooth), cross_entropy(smooth))
    images, many = make_batches()[1]
    same, unmixed = target.mix(images, many)
    assert same is images
    assert unmixed is many
    _, soft = augmentation.Target(TINY, CLASSES).mix(images.clone(), many)
    assert torch.allclose(soft.sum(dim=1), torch.ones(4))


WIDTHS = {"blocks.0.attn": 8, "blocks.0.mlp": 10, "blocks.1.attn": 0}


def test_smaller_prefixes_learn_from_the_full_network(tmp_path):
    found = trainer(tmp_path, dataclasses.replace(TINY, **CALM, distil=1.0, accumulate=1))
    specs = [found.net.resolve(None), found.net.resolve(WIDTHS)]
    found.draw = lambda number: [SampledNetwork(spec, found.net.macs(spec)) for spec in specs]
    targets, learn = [], found.learn
    found.learn = lambda images, target, *rest: (targets.append(target), learn(images, target, *rest))
    images, labels = make_batches()[1]
    with torch.no_grad():
        answer = found.net(images).softmax(dim=1)
    found.update([(images, labels)])
    assert torch.equal(targets[0], labels)
    assert torch.allclose(targets[1], answer, atol=1e-6)


# ---- one step -----------------------------------------------------------------------------------


def stepped(found, batches):
    """Weights before one step, and its gradients."""
    before = {name: parameter.detach().clone() for name, parameter in found.net.model.named_parameters()}
    gradients, step = {}, found.optimiser.step

    def watched():
        gradients.update({name: copy.deepcopy(p.grad) for name, p in found.net.model.named_parameters()})
        step()

    found.optimiser.step = watched
    found.model.train()
    found.update(batches)
    return before, gradients


def skipped(name):
    """Whether the prefix `WIDTHS` skips the module of a weight."""
    return name.startswith(("blocks.1.attn.", "blocks.1.norm1."))


def cut_rows(name, shape):
    """Which entries of a weight the prefix `WIDTHS` cuts."""
    cut = torch.full(shape, skipped(name))
    if name.startswith("blocks.0.attn.qkv"):
        cut.view(3, 2, 16, *shape[1:])[:, :, 8:] = True
    if name == "blocks.0.attn.proj.weight":
        cut.view(32, 2, 16)[:, :, 8:] = True
    if name.startswith("blocks.0.mlp.fc1"):
        cut[10:] = True
    if name == "blocks.0.mlp.fc2.weight":
        cut[:, 10:] = True
    return cut


def test_a_step_touches_what_its_prefix_uses(tmp_path):
    """Cut slices get no gradient, and decay only; modules that are skipped do not even decay."""
    recipe = dataclasses.replace(TINY, accumulate=1, weight_decay=0.5)
    found = trainer(tmp_path, recipe, "paper")
    spec = found.net.resolve(WIDTHS)
    found.draw = lambda number: [SampledNetwork(spec, found.net.macs(spec))]
    before, gradients = stepped(found, [make_batches()[1]])
    after = dict(found.net.model.named_parameters())
    for name, old in before.items():
        cut, gradient = cut_rows(name, old.shape), gradients[name]
        if skipped(name):
            assert gradient is None, name
        else:
            assert not gradient[cut].any(), name
            assert gradient[~cut].any(), name
            assert not torch.equal(after[name][~cut], old[~cut]), name
        factor = 1 - found.rate * 0.5 if old.dim() > 1 and not skipped(name) else 1.0
        assert torch.allclose(after[name][cut], old[cut] * factor, rtol=1e-6, atol=0), name


def test_accumulated_gradients_are_the_mean_over_batches(tmp_path):
    found = trainer(tmp_path, dataclasses.replace(TINY, **CALM), "paper")
    batches, reference = [tuple(t[:4] for t in batch) for batch in make_batches((5, 7))], fresh("paper")
    _, gradients = stepped(found, batches)
    for images, labels in batches:
        (torch.nn.functional.cross_entropy(reference(images), labels, label_smoothing=0.1) / 2).backward()
    for name, parameter in reference.model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6), name


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path):
    data = Images()
    data.images[3] = float("nan")
    with pytest.raises(StrataViTError, match=r"nan at step [0-2] \(prefix \d+, \d+% of MACs, learning rate"):
        run(tmp_path / "run", data=data)
    state = run_files.read_state(tmp_path / "run")
    assert state["step"] == 0
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


def test_a_state_that_is_none(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(stratavit.ArtifactError, match="damaged"):
        run(tmp_path, resume=True)
    torch.save({"format": "other"}, tmp_path / "state.pt")
    with pytest.raises(stratavit.ArtifactError, match=run_files.FORMAT):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "paper"}, "kind = default; now it is paper"),
        ({"data": Subset(Images(), range(16))}, "images = 24; now it is 16"),
    ],
)
def test_a_resumed_run_keeps_its_method_and_data(finished, options, message):
    with pytest.raises(StrataViTError, match=message):
        run(finished["default"][0], resume=True, **options)


def test_full_compensation_is_refused_with_the_papers_method(tmp_path):
    with pytest.raises(StrataViTError, match="compensation"):
        run(tmp_path / "run", "paper", recipe=dataclasses.replace(TINY, compensation="full"))


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (TensorDataset(make_images(24)), {}, "labels"),
        (Images(), {"growths": 4}, r"growths \(4\) .* 3 steps"),
        (Images(), {"list_source": "given"}, "list_source 'given' .* stratify"),
        (Images(), {"list_source": "given", "axes": "both"}, "axes"),
    ],
)
def test_data_that_a_recipe_cannot_be_followed_with(data, changes, message):
    with pytest.raises(StrataViTError, match=message):
        train_piad(fresh(), data, None, dataclasses.replace(TINY, **changes), proxy=make_batches(), cpu=True)


# ---- order --------------------------------------------------------------------------------------


def test_processes_share_an_epoch():
    found = order.Order(50, 50, batch_size=4, processes=3, accumulate=2, repeats=1, seed=0)
    assert found.steps == 2
    keys = [key for process in range(3) for batch in found.batches(1, process) for key in batch]
    assert len({index for _, _, index in keys}) == len(keys) == 48
    assert sorted(place for _, place, _ in keys) == list(range(48))
    assert found.batches(1, 2, first_step=1) == found.batches(1, 2)[2:]
    assert found.indices(0).tolist() != found.indices(1).tolist()


@pytest.mark.parametrize("count", [7, 20, 45])
def test_an_epoch_may_be_a_part_of_a_round_or_more(count):
    """Whatever its length, every image has come equally often after every round."""
    found = order.Order(20, count, batch_size=1, processes=1, accumulate=1, repeats=1, seed=0)
    sequence = torch.cat([found.indices(epoch) for epoch in range(20)])
    assert len(sequence) == 20 * count
    assert torch.equal(sequence.view(-1, 20).sort().values, torch.arange(20).expand(count, 20))
    assert not torch.equal(sequence[:20], sequence[20:40])


def test_repeated_augmentation():
    indices = order.Order(60, 60, batch_size=4, processes=1, accumulate=1, repeats=3, seed=0).indices(0)
    assert len(indices) == 60
    assert torch.unique(indices, return_counts=True)[1].tolist() == [3] * 20
