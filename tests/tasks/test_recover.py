"""Label-free recovery: small models, and all sizes of a super-network, come nearer to their source."""

import copy
import time
from functools import cache
from itertools import count, pairwise

import pytest
import torch
import torch.nn.functional as F
from command_line import make_folder, output, refusal
from helpers import PLAN, make_batches, make_images, make_model, make_net
from timm.models.vision_transformer import VisionTransformer
from training_runs import ONE, Images, assert_same, names, outcome, rows, terminate

import stratavit
from stratavit import StrataViTError
from stratavit.cli.parser import main
from stratavit.elastic.merging import Merged, MergingBlock
from stratavit.tasks import recover as recover_module
from stratavit.tasks import recover_task
from stratavit.tasks.recover_task import Clock, stalled
from stratavit.training.imitation import Changes, Following, Imitation
from stratavit.training.order import Seeded
from stratavit.training.recipe import RECOVERY, Recipe
from stratavit.training.tracing import Trace, block_error, merged_like, trace
from stratavit.training.unused_keys import idle_keys

SHORT = {"batch_size": 4, "lr": 3.5e-3, "lr_unit": "absolute", "bias_norm_lr_scale": 1.0}
SPEC = {"blocks.0.attn": 8, "blocks.0.mlp": 24, "blocks.1.attn": 8, "blocks.1.mlp": 24}


def smooth_images(number, seed):
    """Of which crops look like the whole; noise does not."""
    coarse = torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, 32, mode="bicubic")


IMAGES = [smooth_images(100, seed=3)]  # no labels


def source():
    return make_net("plain", stratified=True)


def small(spec=SPEC):
    return source().extract(spec=spec, verbose=False)


def run(model, out=None, config=SHORT, steps=20, **options):
    if not options.get("resume"):
        options["steps"] = steps
    teacher = None if isinstance(model, stratavit.SuperNet) else source()
    return stratavit.recover(model, IMAGES, teacher, config=config, out=out, cpu=True, **options)


def error(model, spec=None):
    """Mean squared difference to the source on images that recovery did not see."""
    fresh = smooth_images(32, seed=8)
    with torch.no_grad():
        ours = model(fresh) if spec is None else model(fresh, spec)
        return float((ours - source()(fresh)).square().mean())


@cache
def recovered_net():
    return run(copy.deepcopy(source()), steps=60)


# ---- one size -----------------------------------------------------------------------------------


def test_a_small_model_comes_nearer_to_its_source_and_keeps_its_layers():
    model = small()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert run(model, steps=60) is model
    assert error(model) < 0.8 * error(small())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert not model.training


def test_what_a_run_leaves(tmp_path):
    model = run(small(), tmp_path / "run")
    assert names(tmp_path / "run") == {"state.pt", "log.jsonl", "model.safetensors", "stratavit.json", "config.json"}
    with torch.no_grad():
        assert torch.equal(stratavit.load(tmp_path / "run")(make_images(3)), model(make_images(3)))
    facts, found = model.provenance["recover"], rows(tmp_path / "run")
    assert facts["steps"] == 20
    assert model.provenance["spec"]["blocks.0.mlp"] == 24
    assert min(facts["before"]["divergence"], *[row["divergence"] for row in found]) == facts["divergence"]
    assert all(0 <= row["agreement"] <= 100 for row in found)


def test_the_best_weights_are_kept_and_a_run_without_gain_ends(tmp_path, capsys, monkeypatch):
    """Every look finds less agreement than the one before: the model stays as it was."""
    model, before, looks = small(), small().state_dict(), count(1)
    monkeypatch.setattr(recover_task.HeldBack, "distance", lambda *_: (50.0, float(next(looks))))
    run(model, tmp_path / "run", steps=20)
    assert_same(dict(model.state_dict()), dict(before))
    assert len(rows(tmp_path / "run")) == recover_task.PATIENCE
    assert "nothing was learned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("curve", "ends"),
    [
        ([0.5, *([0.6] * 10)], True),  # never better
        ([0.5, *([0.6] * 9)], False),  # for too short a time
        ([0.5, 0.4, *(0.5 + 0.01 * look for look in range(10))], True),  # better at first, then fitted to its images
        ([0.5, *(0.9 - 0.03 * look for look in range(10))], False),  # on the way to a better one
        ([0.5 - 0.01 * look for look in range(20)], False),
    ],
)
def test_a_run_that_is_on_its_way_goes_on(curve, ends):
    assert stalled(curve) == ends


def test_biases_and_norms_alone():
    model, before = small(), small().state_dict()
    run(model, config=SHORT | {"learn": "bias+norm"})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or tensor.dim() == 1, name
    assert not torch.equal(model.norm.bias, before["norm.bias"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_features_are_recovered_too():
    headless = make_net("plain").extract(spec={}, verbose=False)
    headless.reset_classifier(0)
    net = stratavit.SuperNet(headless).contract(make_batches())
    model = net.extract(spec=SPEC, verbose=False)
    facts = stratavit.recover(model, IMAGES, net, steps=20, config=SHORT, cpu=True).provenance["recover"]
    assert facts["divergence"] < facts["before"]["divergence"]


# ---- merged tokens ------------------------------------------------------------------------------


def test_a_model_that_merges_tokens_recovers():
    spec = SPEC | {"blocks.0.tokens": 8}
    model = run(small(spec), steps=60)
    assert isinstance(model.blocks[0], MergingBlock)
    assert error(model) < 0.8 * error(small(spec))


def test_a_model_that_drops_unread_patches_recovers():
    spec = SPEC | {"blocks.0.tokens": 8, "blocks.1.tokens": 0}
    ours = trace(small(spec), make_images(2))
    assert [len(tokens[0]) for tokens in (ours.blocks[-1], ours.tokens)] == [1, 1]
    assert (
        block_error(trace(small({"blocks.1.tokens": 0}), make_images(2)), trace(source().model, make_images(2))) < 1e-9
    )
    assert error(run(small(spec), steps=60)) < 0.8 * error(small(spec))


def test_the_teachers_tokens_are_averaged_by_the_students_map():
    merging = trace(small(SPEC | {"blocks.0.tokens": 8}), make_images(2))
    state, tokens = merging.blocks[0], torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(state, Merged)
    found = merged_like(state, tokens)
    assert torch.equal(found[:, 0], tokens[:, 0])
    for image in range(2):
        for token in range(8):
            mean = tokens[image, 1:][state.home[image] == token].mean(dim=0)
            assert torch.allclose(found[image, 1 + token], mean, atol=1e-6)


def test_the_error_of_blocks_is_relative():
    ours = trace(small(), make_images(2))
    ours = Trace(tuple(tokens.detach() for tokens in ours.blocks), ours.tokens, ours.outputs)
    assert block_error(ours, ours) == 0
    half = Trace(tuple(2 * tokens for tokens in ours.blocks), ours.tokens, ours.outputs)
    assert float(block_error(ours, half)) == pytest.approx(0.25)


# ---- all sizes ----------------------------------------------------------------------------------


def test_sizes_come_nearer_and_stay_sizes_of_one_network(tmp_path):
    before, net = source(), recovered_net()
    assert net.strata.entries == before.strata.entries
    for share in (0.7, 0.5):
        spec = net.spec(macs=share)
        assert error(net, spec) < error(before, spec)
        with torch.no_grad():
            images = make_images(4)
            assert torch.allclose(net.extract(spec=spec, verbose=False)(images), net(images, spec), atol=1e-5)
    specs = [net.strata.spec(position) for position in range(len(net.strata) + 1)]
    assert all(smaller <= larger for larger, smaller in pairwise(specs))
    net.save(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(stratavit.SuperNet.load(tmp_path / "net")(images, spec), net(images, spec))


def test_the_full_size_stays_the_source_and_weights_can_be_trained_again():
    net, before = recovered_net(), source()
    assert_same(dict(net.state_dict()), dict(before.state_dict()))
    with torch.no_grad():
        assert torch.equal(net(make_images(3)), before(make_images(3)))
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert sum(map(torch.numel, net.parameters())) == sum(map(torch.numel, before.parameters()))


def test_what_is_frozen_learns_nothing():
    net = copy.deepcopy(source())
    net.elastic["blocks.0.mlp"].requires_grad_(False)
    run(net)
    assert not any(part.any() for part in net.elastic["blocks.0.mlp"].delta.buffers())
    assert all(part.any() for part in net.elastic["blocks.1.mlp"].delta.buffers())
    assert not any(parameter.requires_grad for parameter in net.elastic["blocks.0.mlp"].parameters())


def test_a_recovered_network_is_stratified_but_not_contracted_again():
    net = copy.deepcopy(recovered_net())
    net.stratify(make_batches(), plan=PLAN)
    assert len(net.strata)
    with pytest.raises(StrataViTError, match=r"extract\(spec=\{\}\)"):
        net.contract(make_batches())
    stratavit.SuperNet(net.extract(spec={})).contract(make_batches())


def test_moments_stay_as_sizes_are_made_from_them():
    for name, module in recovered_net().elastic.items():
        assert torch.equal(module.moments.factor, source().elastic[name].moments.factor)
        assert torch.equal(module.channel_mean, source().elastic[name].channel_mean)


def test_sizes_of_both_lists_learn():
    net = copy.deepcopy(make_net("plain")).stratify(make_batches(), plan=PLAN, axes=("width", "tokens"))
    specs = [net.spec(macs=0.5, axes=axes) for axes in ("width", "both")]
    before = [error(net, spec) for spec in specs]
    run(net, steps=60)
    assert all(error(net, spec) < one for spec, one in zip(specs, before, strict=True))
    assert net.joint_strata is not None


# ---- images -------------------------------------------------------------------------------------


def test_every_image_of_a_batch_is_changed_on_its_own():
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    torch.manual_seed(0)
    found = Changes(config, Recipe(crop=0.25))(images)
    assert found.shape == images.shape
    assert all(not torch.allclose(one, other) for one, other in pairwise(found))


def test_flips_mirror_the_same_crop():
    images, found = torch.rand(2, 3, 16, 16), []
    for flip in (0.0, 1.0):
        torch.manual_seed(1)
        found.append(Changes({"mean": (0.0,) * 3, "std": (1.0,) * 3}, Recipe(flip=flip)).cropped(images))
    assert torch.allclose(found[1], found[0].flip(3), atol=1e-5)


def test_a_folder_needs_no_classes(tmp_path):
    make_folder(tmp_path / "classes", ["a", "b"], train=6)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((tmp_path / "classes").rglob("*.png"))):
        path.rename(flat / f"{number:02}.png")
    models = [small(), small()]
    for model, folder in zip(models, (flat, str(flat)), strict=True):
        stratavit.recover(model, folder, source(), steps=2, config=SHORT, cpu=True)
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))


# ---- how long, and interruptions ----------------------------------------------------------------


@pytest.mark.parametrize("make", [small, lambda: copy.deepcopy(source())], ids=["small", "all sizes"])
def test_interrupted_and_resumed(tmp_path, monkeypatch, make):
    run(make(), tmp_path / "whole")
    read, reads = Seeded.__getitem__, []

    def stopped(self, key):
        reads.append(key)
        if len(reads) == 30:
            terminate()
        return read(self, key)

    monkeypatch.setattr(Seeded, "__getitem__", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(make(), tmp_path / "run")
    monkeypatch.undo()
    run(make(), tmp_path / "run", resume=True)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_run_learns_from_all_images_alike(monkeypatch):
    """Also where what lies between two looks is less than all of them, or more."""
    read, numbers = Seeded.__getitem__, []

    def seen(self, key):
        numbers.append(key[2])
        return read(self, key)

    monkeypatch.setattr(Seeded, "__getitem__", seen)
    for steps in (20, 60):
        numbers.clear()
        run(small(), steps=steps)
        counts = torch.bincount(torch.tensor(numbers))
        assert len(counts) > SHORT["batch_size"]
        assert counts.max() - counts.min() <= 1


def test_minutes_are_planned_from_timed_steps():
    """Of 600 s 570 are planned; 21 looks of 2 s leave 528, less what is gone and what comes at the end."""
    now = time.perf_counter()

    def timed(clock, recipe, length):
        assert (recipe.epochs, length) == (2, recover_module.TIMED * 4)
        clock.looks += [(0.0, 2.0), (50.0, 52.0), (56.0, 58.0)]  # a step takes 2 s

    steps = recover_module._steps_within(Clock(now - 100, limit=600), timed, Recipe.from_dict(RECOVERY | SHORT))
    around = -58  # the fake run took no time at all
    assert abs(steps - (570 - 100 - around - 42) / 2) <= 1


def test_a_stop_while_steps_are_timed_names_no_folder(monkeypatch):
    monkeypatch.setattr(Seeded, "__getitem__", lambda self, key: terminate() or self.dataset[0])
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        run(small(), steps=None, minutes=10)


def test_minutes_and_steps():
    assert run(small(), minutes=10).provenance["recover"]["steps"] == 20


def test_a_run_that_has_become_slow_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(recover_module, "_steps_within", lambda *args: 100)
    run(small(), tmp_path / "run", steps=None, minutes=1e-3)
    assert len(rows(tmp_path / "run")) == 1
    assert Clock(0, limit=10, looks=[(0, 1), (3, 4), (7, 8)]).late
    assert not Clock(0, limit=12, looks=[(0, 1), (3, 4), (7, 8)]).late


# ---- the blocks in PIAD -------------------------------------------------------------------------


def test_piad_follows_blocks_too():
    recipe = {**ONE.to_dict(), "distil_blocks": 10.0, "drop_path": 0.0}
    nets = [copy.deepcopy(make_net("plain")) for _ in range(2)]
    for net, keys in zip(nets, (recipe, recipe | {"distil_blocks": 0.0}), strict=True):
        stratavit.train_piad(net, Images(), None, keys, proxy=make_batches(), cpu=True)
    assert not torch.equal(nets[0].model.blocks[0].mlp.fc1.weight, nets[1].model.blocks[0].mlp.fc1.weight)


def test_a_network_that_is_not_taught_learns_from_its_labels_alone():
    following = Following(Imitation({"mean": (0.5,), "std": (0.5,)}, Recipe(), 7), blocks=1.0)
    ours = trace(small(), make_images(2))
    assert following.loss(ours, ours.outputs) == 0
    theirs = trace(make_model("plain"), make_images(2))
    assert following.loss(ours, (ours.outputs, theirs)) == block_error(ours, theirs)


# ---- mistakes -----------------------------------------------------------------------------------


def wide():
    return VisionTransformer(img_size=32, patch_size=8, num_classes=7, embed_dim=48, depth=2, num_heads=3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher": None}, "needs its teacher"),
        ({"teacher": wide()}, r"\(17, 48\)"),
        ({"teacher": make_model("registers")}, r"\(20, 32\)"),
        ({"steps": 0}, "steps of at least 1"),
        ({"steps": None, "minutes": -1.0}, "minutes above 0"),
        ({"steps": None, "minutes": 1e-4}, "minutes are too few"),
        ({"images": [make_images(1)]}, "at least 2"),
        ({"resume": True, "out": "nowhere"}, "leave out both"),
        ({"resume": True, "steps": None}, "folder of the interrupted run"),
    ],
)
def test_mistakes(options, named):
    options = {"images": IMAGES, "teacher": source(), "steps": 2, "config": SHORT, "cpu": True} | options
    with pytest.raises(StrataViTError, match=named):
        stratavit.recover(small(), options.pop("images"), **options)


@pytest.mark.parametrize(
    ("make", "keys", "named"),
    [(lambda: make_net("plain"), {}, "no dropout list"), (source, {"reduction": 1e-4}, "drops less than 0.0001")],
)
def test_a_super_network_needs_a_list_with_sizes_and_leaves_nothing_without(tmp_path, make, keys, named):
    with pytest.raises(StrataViTError, match=named):
        run(copy.deepcopy(make()), tmp_path / "run", config=SHORT | keys)
    assert not (tmp_path / "run").exists()


def test_keys_without_effect_are_reported():
    keys = {"erasing": 0.5, "drop_path": 0.1, "mixup": 0.1, "reduction": 0.5, "growths": 2}
    for classes in (0, 7):
        assert set(idle_keys(Recipe.from_dict(RECOVERY | keys), "recovery", classes)) == {
            "erasing",
            "drop_path",
            "growths",
        }


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("recover") / "data", ["a", "b", "c"], train=8).parent
    source().save(folder / "run")
    stratavit.save(small(), folder / "small")
    return folder


def arguments(work, target, out, *more):
    paths = ["recover", work / target, "--data", work / "data", "--out", out, "--device", "cpu"]
    return [*map(str, paths), "--steps", "4", "--batch-size", "4", *more]


def test_the_command(work, tmp_path, capsys):
    result = output(capsys, *arguments(work, "small", tmp_path / "small", "--teacher", str(work / "run")))
    assert result["steps"] == 4
    assert 0 <= result["agreement"] <= 100
    assert stratavit.load(tmp_path / "small").provenance["recover"]["steps"] == 4
    assert output(capsys, *arguments(work, "run", tmp_path / "run"))["steps"] == 4
    assert stratavit.SuperNet.load(tmp_path / "run").provenance["recover"]["steps"] == 4
    assert "needs its teacher" in refusal(capsys, *arguments(work, "small", tmp_path / "none"))
    lone = ("--teacher-weights", "x.safetensors")
    assert "--teacher MODEL" in refusal(capsys, *arguments(work, "small", tmp_path / "none", *lone))


def test_a_run_is_resumed_by_its_folder_alone(work, tmp_path, capsys, monkeypatch):
    assert main(arguments(work, "small", tmp_path / "whole", "--teacher", str(work / "run"), "--images", "12")) == 0
    read, reads = Seeded.__getitem__, []

    def stopped(self, key):
        reads.append(key)
        if len(reads) == 10:
            terminate()
        return read(self, key)

    monkeypatch.setattr(Seeded, "__getitem__", stopped)
    assert main(arguments(work, "small", tmp_path / "out", "--teacher", str(work / "run"), "--images", "12")) == 143
    monkeypatch.undo()
    assert main(["recover", "--resume", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "whole"))
